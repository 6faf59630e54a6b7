package command

import (
	"slices"
	"strings"

	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/cli/ui"
)

// plannedDocument is a machine in `provision --dry-run --json`.
type plannedDocument struct {
	Event      string `json:"event"` // planned
	Name       string `json:"name"`
	State      string `json:"state"` // exists or missing
	Host       string `json:"host,omitempty"`
	Type       string `json:"type,omitempty"`
	Location   string `json:"location,omitempty"`
	Image      string `json:"image,omitempty"`
	Monthly    string `json:"monthly,omitempty"`
	Controller bool   `json:"controller"`
}

// planDocument is the end of `provision --dry-run --json`.
type planDocument struct {
	Event   string   `json:"event"` // plan
	Missing int      `json:"missing"`
	Other   []string `json:"other"`
	Monthly string   `json:"monthly,omitempty"`
}

// tellMachines says what would be made, and makes nothing.
func (a *app) tellMachines(me *identity, o *provisionOptions, plan *provision.Plan) error {
	controller, err := a.controllerOf(me, o)
	if err != nil {
		return err
	}
	documents := []plannedDocument{}
	for _, s := range plan.Existing {
		documents = append(documents, plannedDocument{Event: "planned", Name: s.Name, State: "exists", Host: s.Host, Type: s.Type, Location: s.Location})
	}
	for _, m := range plan.Missing {
		documents = append(documents, plannedDocument{Event: "planned", Name: m.Name, State: "missing", Type: m.Type, Location: m.Location, Image: m.Image, Monthly: m.Monthly})
	}
	slices.SortStableFunc(documents, func(x, y plannedDocument) int {
		return slices.Index(o.names, x.Name) - slices.Index(o.names, y.Name)
	})
	var rows [][]ui.Cell
	for i := range documents {
		d := &documents[i]
		d.Controller = d.Name == controller
		if a.json {
			a.document(d)
			continue
		}
		row := ui.Text(d.Name, map[string]string{"exists": "is there", "missing": "to be made"}[d.State], d.Host, d.Type, d.Location, d.Image, d.Monthly)
		if d.Controller {
			row[1].Text += ", and the controller"
		}
		rows = append(rows, row)
	}
	if a.json {
		a.document(planDocument{"plan", len(plan.Missing), list(plan.Other), plan.Monthly})
		return nil
	}
	a.out.Table([]string{"MACHINE", "IS", "HOST", "TYPE", "LOCATION", "IMAGE", "A MONTH"}, rows)
	if len(plan.Other) > 0 {
		a.say("also to be made: %s\n", ui.Clean(strings.Join(plan.Other, ", ")))
	}
	if plan.Monthly != "" {
		a.say("in all: %s\n", ui.Clean(plan.Monthly))
	}
	a.say("nothing was made\n")
	return nil
}
