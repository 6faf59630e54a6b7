package command

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// unknownSubcommand refuses words that cobra would hand to a group's help.
func unknownSubcommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	hint := "; see " + c.CommandPath() + " --help"
	c.SuggestionsMinimumDistance = 2
	if near := c.SuggestionsFor(args[0]); len(near) > 0 {
		hint = "; did you mean " + strings.Join(near, " or ") + "?"
	}
	return fmt.Errorf("unknown command %q for %q%s", args[0], c.CommandPath(), hint)
}

// explainWords has a command, and those below it, say what it takes where cobra only counts: "accepts 1 arg(s), received 0".
func explainWords(c *cobra.Command) {
	for _, sub := range c.Commands() {
		explainWords(sub)
	}
	check := c.Args
	if check == nil || c.HasSubCommands() {
		return
	}
	c.Args = func(c *cobra.Command, args []string) error {
		err := check(c, args)
		if err == nil || !isCount(err) {
			return err
		}
		got := "what it takes is missing"
		if len(args) > 0 {
			got = fmt.Sprintf("%q is not what it takes", strings.Join(args, " "))
		}
		return fmt.Errorf("%s: %s %s; see %s --help", got, c.Parent().CommandPath(), c.Use, c.CommandPath())
	}
}

// isCount tells cobra's own errors about arguments, which have no type.
func isCount(err error) bool {
	for _, begins := range []string{"accepts ", "requires at least ", "unknown command "} {
		if strings.HasPrefix(err.Error(), begins) {
			return true
		}
	}
	return false
}

// negatable gives each flag that is on or off, of a command and those below it, the opposite that the earlier tool had of it:
// --no-batch takes back --batch.
func negatable(c *cobra.Command) {
	for _, sub := range c.Commands() {
		negatable(sub)
	}
	for _, flags := range []*pflag.FlagSet{c.Flags(), c.PersistentFlags()} {
		var names []string
		flags.VisitAll(func(f *pflag.Flag) {
			if f.Value.Type() == "bool" && !strings.HasPrefix(f.Name, "no-") {
				names = append(names, f.Name)
			}
		})
		for _, name := range names {
			flags.BoolFunc("no-"+name, "takes back --"+name, func(text string) error {
				not, err := strconv.ParseBool(text)
				if err != nil {
					return err
				}
				return flags.Set(name, strconv.FormatBool(!not))
			})
			flags.Lookup("no-" + name).Hidden = true // where the opposite is worth a word, the flag's own text has it
		}
	}
}

// registryCommand stands where the earlier tool had its registry, and says what is done instead, whatever the flags are.
func registryCommand() *cobra.Command {
	return &cobra.Command{
		Use: "registry", Aliases: []string{"publish-image"}, Short: "Not there yet", Hidden: true, DisableFlagParsing: true,
		RunE: func(*cobra.Command, []string) error {
			return errors.New("nix-infra publishes no images yet; have the node of the registry load one (nix-infra ssh NODE -- podman load < IMAGE.tar.gz), " +
				"and push it from there (nix-infra ssh NODE -- podman push NAME REGISTRY:5000/apps/NAME:TAG)")
		},
	}
}
