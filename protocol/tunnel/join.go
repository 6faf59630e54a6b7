package tunnel

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
)

// Stream is a connection whose two directions end one by one, as those of TCP and Unix sockets do.
type Stream interface {
	net.Conn
	CloseWrite() error
}

// Join has bytes go both ways between a tunnel and a connection until both directions have ended, closes both, and
// returns why the tunnel broke, nil if it did not. An end that is a real one is passed on as one; where either side
// breaks, the other one is made to see that, too. name is what errors call the connection.
func Join(c *Conn, s Stream, name string) error {
	go func() {
		<-c.Done()
		if tcp, ok := s.(interface{ SetLinger(int) error }); ok && c.Err() != nil {
			_ = tcp.SetLinger(0) // the other side gets a reset, not what looks like the end
		}
		s.Close()
	}()
	out := make(chan struct{})
	go func() {
		defer close(out)
		if _, err := io.Copy(s, c); err != nil {
			c.Reset(explain(err, name))
			return
		}
		_ = s.CloseWrite() // where the other side is gone, the copy back shows it
	}()
	if _, err := io.Copy(c, s); err != nil {
		c.Reset(explain(err, name))
	} else {
		_ = c.CloseWrite() // it fails where the tunnel broke
	}
	<-out
	_ = c.Close()
	<-c.Done()
	return c.Err()
}

// explain says what went wrong without what the system's words have around it.
func explain(err error, name string) string {
	var call *os.SyscallError
	if errors.As(err, &call) {
		err = call.Err
	}
	return fmt.Sprintf("%s: %v", name, err)
}
