package command

import (
	"reflect"

	"github.com/nix-infra/nix-infra/cli/project"
)

// changeSettings changes nix-infra.yaml as it is now, and tells whether that made a difference. Scripts start several
// commands at once, and what one of them records must not undo what another one did since this one read the settings.
func (a *app) changeSettings(change func(now *project.Project) (project.Settings, error)) (changed bool, err error) {
	err = a.alone(func() error {
		now, err := a.openProject()
		if err != nil {
			return err
		}
		after, err := change(now)
		if err != nil || reflect.DeepEqual(now.Settings, after) {
			return err
		}
		changed = true
		return project.WriteSettings(now.Dir, after)
	})
	return changed, err
}
