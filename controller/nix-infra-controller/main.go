// Command nix-infra-controller carries the messages of a fleet and keeps its desired state.
package main

import (
	"fmt"
	"os"
	"strings"
	_ "time/tzdata" // maintenance windows are in time zones, which the machine may not know

	"github.com/nix-infra/nix-infra/controller"
)

func main() {
	if err := controller.Command().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "nix-infra-controller:", strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}
