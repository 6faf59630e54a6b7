package command

import "golang.org/x/sys/unix"

func isMemory(fs *unix.Statfs_t) bool {
	return fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC
}
