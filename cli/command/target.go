package command

import (
	"slices"

	"github.com/spf13/cobra"
)

const targetUsage = "`nodes`, as a selector: another way to say it than by words of their own; repeatable"

// withTarget gives a command --target, whose selectors count like those that stand alone.
func withTarget(c *cobra.Command) *cobra.Command {
	var targets []string
	c.Flags().StringArrayVar(&targets, "target", nil, targetUsage)
	all := func(args []string) []string { return append(slices.Clone(targets), args...) }
	check, run := c.Args, c.RunE
	c.Args = func(c *cobra.Command, args []string) error { return check(c, all(args)) }
	c.RunE = func(c *cobra.Command, args []string) error { return run(c, all(args)) }
	return c
}
