package upload

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/transfer"
)

// wanted is a file whose bytes the user is to send.
type wanted struct {
	transfer.File
	offset int64
}

// plan says what is wanted of some files.
func (u *session) plan(ctx context.Context, files []transfer.File) (transfer.Plan, []wanted, error) {
	room, err := u.room()
	if err != nil {
		return transfer.Plan{}, nil, err
	}
	plan := transfer.Plan{Steps: make([]transfer.Step, len(files))}
	var all []wanted
	begun := map[string]bool{} // whose beginning another file of the plan takes
	for i, f := range files {
		step, err := u.step(ctx, f, begun[f.SHA256], &room)
		if ctx.Err() != nil {
			return plan, nil, ctx.Err()
		}
		if err != nil {
			step = transfer.Step{Refused: asRefusal(err)}
		}
		if plan.Steps[i] = step; step == (transfer.Step{Offset: step.Offset}) {
			all = append(all, wanted{f, step.Offset})
			begun[f.SHA256] = true
		}
	}
	return plan, all, nil
}

// step is what is wanted of one file.
func (u *session) step(ctx context.Context, f transfer.File, begun bool, room *int64) (transfer.Step, error) {
	same, err := u.unchanged(ctx, f)
	if err != nil {
		return transfer.Step{}, err
	}
	if same {
		u.same++
		return transfer.Step{Unchanged: true}, nil
	}
	if err := u.hold(ctx, u.partial(f)); err != nil {
		return transfer.Step{}, err
	}
	var s unix.Stat_t
	offset := int64(0)
	if !begun && unix.Fstatat(int(u.staging.Fd()), u.partial(f), &s, unix.AT_SYMLINK_NOFOLLOW) == nil && s.Size <= f.Size {
		offset = s.Size
	}
	if *room -= f.Size - offset; *room < 0 {
		*room += f.Size - offset
		return transfer.Step{}, protocol.Refuse(protocol.Failed, "there is no room for %s, which has %d bytes: the file system of %s has %d left for uploads", f.Path, f.Size, u.to, max(0, *room))
	}
	return transfer.Step{Offset: offset}, nil
}

// partial is the name of what there is of a file in the staging folder.
func (u *session) partial(f transfer.File) string { return f.SHA256 + "." + u.who.Name }

// unchanged tells whether the node has a file as it is offered, but for its permissions, which it then gets.
func (u *session) unchanged(ctx context.Context, f transfer.File) (bool, error) {
	folder, err := walk(u.root, path.Join(u.below, path.Dir(f.Path)), unix.RESOLVE_NO_XDEV, false)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer folder.Close()
	at := folder.Name() + "/" + path.Base(f.Path)
	fd, err := unix.Openat2(int(folder.Fd()), path.Base(f.Path), &unix.OpenHow{Flags: unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC})
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	} else if err != nil {
		return false, explain(at, err)
	}
	defer unix.Close(fd)
	var s unix.Stat_t
	if err := unix.Fstat(fd, &s); err != nil {
		return false, err
	}
	if s.Mode&unix.S_IFMT != unix.S_IFREG {
		return false, protocol.Refuse(protocol.Invalid, "%s is there, and is no regular file", at)
	}
	if s.Size != f.Size {
		return false, nil
	}
	file, err := reopen(fd, at)
	if err != nil {
		return false, err
	}
	defer file.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, &until{ctx, io.LimitReader(file, f.Size)}); err != nil {
		return false, err
	}
	if digest(sum) != f.SHA256 {
		return false, nil
	}
	return true, file.Chmod(mode(f))
}

func digest(sum hash.Hash) string { return hex.EncodeToString(sum.Sum(nil)) }

// mode are the permissions that a file gets: nobody but its owner may change what was uploaded.
func mode(f transfer.File) os.FileMode { return os.FileMode(f.Mode&0o755 | 0o600) }

// receive takes the bytes of a file in and, if they are the right ones, puts it in its place.
func (u *session) receive(ctx context.Context, w wanted) (transfer.Result, error) {
	name := u.partial(w.File)
	fd, err := unix.Openat2(int(u.staging.Fd()), name, &unix.OpenHow{Flags: unix.O_RDWR | unix.O_CREAT | unix.O_NOFOLLOW | unix.O_CLOEXEC, Mode: 0o600,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return transfer.Result{}, asRefusal(explain(u.staging.Name()+"/"+name, err))
	}
	file := os.NewFile(uintptr(fd), u.staging.Name()+"/"+name)
	defer file.Close()
	sum, err := u.fill(ctx, file, w)
	if err != nil {
		return transfer.Result{}, err
	}
	if digest(sum) != w.SHA256 {
		return transfer.Result{Mismatch: true}, unix.Unlinkat(int(u.staging.Fd()), name, 0)
	}
	if err := u.place(file, name, w); err != nil {
		return transfer.Result{}, asRefusal(err)
	}
	u.wrote(w.File)
	return transfer.Result{}, nil
}

// fill completes a file in the staging folder, and gives the digest of all of it.
func (u *session) fill(ctx context.Context, file *os.File, w wanted) (hash.Hash, error) {
	if err := file.Truncate(w.offset); err != nil {
		return nil, asRefusal(explain(file.Name(), err))
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, &until{ctx, file}); err != nil {
		return nil, err
	}
	buffer := make([]byte, 128<<10)
	for left := w.Size - w.offset; left > 0; {
		_ = u.conn.SetReadDeadline(time.Now().Add(silence)) // as in serve
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		n, err := u.conn.Read(buffer[:min(left, int64(len(buffer)))])
		sum.Write(buffer[:n])
		if _, err := file.Write(buffer[:n]); err != nil {
			return nil, asRefusal(explain(file.Name(), err))
		}
		left -= int64(n)
		if err != nil && left > 0 {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return sum, nil
}

// place moves a whole file from the staging folder to where it belongs, for good.
func (u *session) place(file *os.File, name string, w wanted) error {
	if err := file.Chmod(mode(w.File)); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return explain(file.Name(), err)
	}
	folder, err := walk(u.root, path.Join(u.below, path.Dir(w.Path)), unix.RESOLVE_NO_XDEV, true)
	if err != nil {
		return err
	}
	defer folder.Close()
	if err := unix.Renameat(int(u.staging.Fd()), name, int(folder.Fd()), path.Base(w.Path)); err != nil {
		return explain(folder.Name()+"/"+path.Base(w.Path), err)
	}
	return folder.Sync()
}

func (u *session) wrote(f transfer.File) {
	u.written++
	u.bytes += f.Size
	if len(u.names) < maxNames {
		u.names = append(u.names, f.Path)
	}
}

// reopen opens for reading what an O_PATH descriptor is of.
func reopen(fd int, name string) (*os.File, error) {
	opened, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(opened), name), nil
}

// until is a reader that ends with a context.
type until struct {
	ctx context.Context
	io.Reader
}

func (r *until) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}
