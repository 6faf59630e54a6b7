package testfleet

import (
	"testing"

	"golang.org/x/sys/unix"
)

// Port is a TCP port of 127.0.0.1 that is the test's to its end: the kernel gives it to nobody who lets it choose one, and a connection to it is
// refused until somebody listens at it, who has to name it. A port that was found free, and let go of, may be anybody's a moment later.
func Port(tb testing.TB) int {
	tb.Helper()
	must := func(err error) {
		tb.Helper()
		if err != nil {
			tb.Fatalf("no port can be kept: %v", err)
		}
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(err)
	tb.Cleanup(func() { unix.Close(fd) })
	// A socket that is bound and does not listen is in nobody's way who sets the same option, as Go does where it listens.
	must(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	must(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	at, err := unix.Getsockname(fd)
	must(err)
	return at.(*unix.SockaddrInet4).Port
}
