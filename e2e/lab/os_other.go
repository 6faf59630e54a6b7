//go:build !linux

package lab

import (
	"errors"
	"os"
)

// Elsewhere the package only has to compile: Available says why it can't run.

func overlaid(string) bool { return false }

func inNetwork(string, func() error) error { return errors.ErrUnsupported }

func openInRoot(int, string) (*os.File, error) { return nil, errors.ErrUnsupported }
