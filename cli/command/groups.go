package command

import "github.com/spf13/cobra"

// runCommands are the commands that have nodes run something.
func (a *app) runCommands() []*cobra.Command {
	return []*cobra.Command{a.execCommand(), a.actionCommand()}
}
