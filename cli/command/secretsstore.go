package command

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// valueFlags say where a secret's value comes from.
type valueFlags struct {
	inline, file string
	generate     int
	given        bool // --secret, which may be empty
}

func (v *valueFlags) register(f *pflag.FlagSet) {
	f.StringVar(&v.inline, "secret", "", "the `value` itself; everybody on this machine can see it while the command runs")
	f.StringVar(&v.file, "secret-file", "", "`file` with the value")
	f.IntVar(&v.generate, "generate", 0, "make a value up of `N` random bytes, as text of A-Z a-z 0-9 - _")
}

// read gives the value. The newline that ends a single line is how people and programs write lines, and not part of it.
func (v *valueFlags) read(a *app, c *cobra.Command) ([]byte, error) {
	v.given = c.Flags().Changed("secret")
	ways := 0
	for _, given := range []bool{v.given, v.file != "", c.Flags().Changed("generate")} {
		if given {
			ways++
		}
	}
	if ways > 1 {
		return nil, errors.New("--secret, --secret-file and --generate each give the value; use one of them")
	}
	switch {
	case v.given:
		a.note("warning: --secret shows the value in the list of processes and in the shell's history; pipe it in, or use --secret-file")
		return oneLine([]byte(v.inline)), nil
	case v.file != "":
		data, err := os.ReadFile(v.file)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("there is no file %s; check --secret-file", v.file)
		}
		return oneLine(data), err
	case c.Flags().Changed("generate"):
		return generate(v.generate)
	}
	return a.pipedSecret()
}

// pipedSecret reads a value from stdin, or asks for it.
func (a *app) pipedSecret() ([]byte, error) {
	if f, ok := a.Stdin.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		if a.batch {
			return nil, errors.New("there is no value: pipe it in, or use --secret-file or --generate")
		}
		text, err := a.prompt("The secret: ")
		return []byte(text), err
	}
	data, err := io.ReadAll(io.LimitReader(a.Stdin, protocol.MaxSecretSize+2)) // a byte more than may be, and a newline
	if err != nil {
		return nil, err
	}
	if len(data) == 0 {
		return nil, errors.New("there is no value: pipe it in, or use --secret-file or --generate")
	}
	return oneLine(data), nil
}

// oneLine takes the newline from the end of a single line. Text of several lines, such as a key's, stays as it is.
func oneLine(data []byte) []byte {
	if i := bytes.IndexByte(data, '\n'); i >= 0 && i == len(data)-1 {
		return bytes.TrimSuffix(data[:i], []byte("\r"))
	}
	return data
}

// generate makes a secret up of n bytes of randomness.
func generate(n int) ([]byte, error) {
	if n < project.MinGenerate || n > project.MaxGenerate {
		return nil, fmt.Errorf("--generate %d: use %d to %d bytes", n, project.MinGenerate, project.MaxGenerate)
	}
	random := make([]byte, n)
	rand.Read(random) // never fails
	return []byte(base64.RawURLEncoding.EncodeToString(random)), nil
}

// storedDocument is a secret that was stored, in --json.
type storedDocument struct {
	Name     string `json:"name"`
	Path     string `json:"path"`
	Replaced bool   `json:"replaced"`
}

func (a *app) secretsStoreCommand() *cobra.Command {
	var name string
	var value valueFlags
	c := &cobra.Command{
		Use:   "store NAME",
		Short: "Store a secret, or give one another value",
		Long: `Store a secret, or give one another value: from a pipe, a file or a generator. Nodes get it by the next deploy; use
rotate for one that they have, which brings it to them at once, and back where it does not work.

The newline that ends a single line is not stored; a text of several lines is stored as it is. A value may contain
placeholders such as [%%db1.ipv4%%] and [%%localhost.hostname%%], which are filled in for each node, but no other
secrets.`,
		Example: `  pass show shop/db | nix-infra secrets store db.password
  nix-infra secrets store tls.key --secret-file tls.key
  nix-infra secrets store session.key --generate 32`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 1 && name != "" && args[0] != name {
				return fmt.Errorf("is it called %s or %s?", args[0], name)
			}
			return a.secretsStore(c, first(name, strings.Join(args, "")), &value)
		},
	}
	c.Flags().StringVar(&name, "name", "", "the secret's name, in place of the argument")
	value.register(c.Flags())
	return c
}

// storeSecretCommand is secrets store, as the earlier tool called it.
func (a *app) storeSecretCommand() *cobra.Command {
	var name, alias string
	var value valueFlags
	c := &cobra.Command{
		Use: "store-secret --store-as-secret NAME", Short: "Older name of secrets store", Hidden: true, Args: cobra.NoArgs,
		Example: `  nix-infra store-secret --secret-file db.password --store-as-secret db.password`,
		RunE:    func(c *cobra.Command, _ []string) error { return a.secretsStore(c, first(name, alias), &value) },
	}
	c.Flags().StringVar(&name, "store-as-secret", "", "the secret's name")
	c.Flags().StringVar(&alias, "save-as-secret", "", "the secret's name")
	value.register(c.Flags())
	return c
}

func (a *app) secretsStore(c *cobra.Command, name string, from *valueFlags) error {
	if name == "" {
		return errors.New("what is the secret called? nix-infra secrets store NAME")
	}
	if err := protocol.CheckSecretName(name); err != nil {
		return err
	}
	p, err := a.openProject()
	if err != nil {
		return err
	}
	value, err := from.read(a, c)
	if err != nil {
		return err
	}
	s := a.secretStore(p)
	d := storedDocument{name, s.Path(name), s.Has(name)}
	if err := s.Put(name, value); err != nil {
		return err
	}
	if a.json {
		a.document(d)
	}
	a.say("stored secret %s\n", name)
	return nil
}
