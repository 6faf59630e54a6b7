package vault

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/term"
)

// The variables that hold the password.
const (
	Variable       = "SECRETS_PASS"
	NewVariable    = "SECRETS_NEW_PASS"    // what secrets rekey changes it to
	LegacyVariable = "SECRETS_LEGACY_PASS" // of what the earlier tool encrypted, where that was another one
	olderVariable  = "SECRETS_PWD"
)

// ErrNoPassword is what a password that nobody can be asked for ends in.
var ErrNoPassword = errors.New("no password")

// Password finds a vault's password when it is first called for, and at most once: SECRETS_PASS, then
// SECRETS_PWD (with a warning on stderr), then the prompt. An empty variable counts as unset. prompt is
// nil where nobody may be asked (--batch).
func Password(env func(string) string, prompt func(label string) (string, error)) func() (string, error) {
	return passwordFrom(env, prompt, os.Stderr)
}

func passwordFrom(env func(string) string, prompt func(string) (string, error), warnings io.Writer) func() (string, error) {
	return sync.OnceValues(func() (string, error) {
		if password := env(Variable); password != "" {
			return password, nil
		}
		if password := env(olderVariable); password != "" {
			fmt.Fprintf(warnings, "nix-infra: %s is the older name of %s: please rename it\n", olderVariable, Variable)
			return password, nil
		}
		if prompt == nil {
			return "", fmt.Errorf("%w: set %s in the environment or in .env", ErrNoPassword, Variable)
		}
		password, err := prompt("Password of the project: ")
		switch {
		case err != nil:
			return "", err
		case password == "":
			return "", fmt.Errorf("%w: an empty one protects nothing", ErrNoPassword)
		}
		return password, nil
	})
}

// NewPassword is what a vault is rekeyed with: SECRETS_NEW_PASS, else the prompt. It is found at most once.
func NewPassword(env func(string) string, prompt func(label string) (string, error)) func() (string, error) {
	return sync.OnceValues(func() (string, error) {
		if password := env(NewVariable); password != "" {
			return password, nil
		}
		if prompt == nil {
			return "", fmt.Errorf("%w for the project from now on: set %s", ErrNoPassword, NewVariable)
		}
		password, err := prompt("New password of the project: ")
		if err == nil && password == "" {
			err = fmt.Errorf("%w: an empty one protects nothing", ErrNoPassword)
		}
		return password, err
	})
}

// LegacyPassword is the one of what the earlier tool encrypted: SECRETS_LEGACY_PASS, else the vault's own.
func (v *Vault) LegacyPassword(env func(string) string) (string, error) {
	if password := env(LegacyVariable); password != "" {
		return password, nil
	}
	return v.ring.password()
}

// Prompt asks on the terminal, without echo. It is a prompt for Password; where stdin is no terminal it
// is ErrNoPassword.
func Prompt(label string) (string, error) {
	in := int(os.Stdin.Fd())
	if !term.IsTerminal(in) {
		return "", fmt.Errorf("%w and no terminal to ask on: set %s in the environment or in .env", ErrNoPassword, Variable)
	}
	fmt.Fprint(os.Stderr, label)
	password, err := term.ReadPassword(in)
	fmt.Fprintln(os.Stderr)
	if err != nil {
		return "", fmt.Errorf("%w: can't read it from the terminal: %v", ErrNoPassword, err)
	}
	return string(password), nil
}

// Twice has a new password typed two times, because a slip would lock its owner out.
func Twice(prompt func(label string) (string, error)) func(label string) (string, error) {
	return func(label string) (string, error) {
		first, err := prompt(label)
		if err != nil || first == "" {
			return first, err
		}
		second, err := prompt("The same again: ")
		if err != nil {
			return "", err
		}
		if first != second {
			return "", fmt.Errorf("%w: the two differ; start again", ErrNoPassword)
		}
		return first, nil
	}
}
