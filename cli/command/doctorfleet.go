package command

import (
	"context"
	"errors"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

// What is little, of a disk: in bytes, or as a part of it.
const (
	littleSpace = 1 << 30
	noSpace     = 256 << 20
)

// Certificates of controllers are for a long time, and their end cuts everybody off.
const certificateSoon = 30 * 24 * time.Hour

func date(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// checkOperator looks at the machine that this runs on.
func (d *doctor) checkOperator() {
	d.area = "operator"
	if _, err := exec.LookPath("ssh"); err != nil {
		d.add(warning, "ssh", "programs", "install it", "it is not on this machine, and nix-infra ssh needs it")
	} else {
		d.add(fine, "ssh", "programs", "", "it is here")
	}
	if _, err := nix.LookPath("nix"); err != nil && d.project != nil && d.project.Settings.Cache.Push != "" {
		d.add(warning, "nix", "programs", "install Nix, or leave the building to the nodes", "it is not on this machine, and deploy --build=local, which the settings have a cache for, needs it")
	} else if err == nil {
		d.add(fine, "nix", "programs", "", "it is here")
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(d.dir, &disk); err == nil {
		d.disk("this machine", "make room", int64(disk.Bavail)*int64(disk.Bsize), int64(disk.Blocks)*int64(disk.Bsize))
	}
}

// disk judges the free space of a file system.
func (d *doctor) disk(about, do string, free, total int64) {
	switch {
	case total <= 0:
	case free < noSpace:
		d.add(problem, about, "disk", do, "%s of %s are free", size(free), size(total))
	case free < littleSpace || free < total/20:
		d.add(warning, about, "disk", do, "%s of %s are free", size(free), size(total))
	default:
		d.add(fine, about, "disk", "", "%s of %s are free", size(free), size(total))
	}
}

// clock judges how far a clock is ahead of this machine's.
func (d *doctor) clock(about, check string, ahead time.Duration) {
	const do = "have NTP set the one that is wrong (timedatectl)"
	word := "ahead of"
	if ahead < 0 {
		word = "behind"
	}
	switch off := ahead.Abs().Round(time.Second); {
	case off >= protocol.ClockSkew/2:
		d.add(problem, about, check, do, "its clock is %s %s this machine's; at %s, orders are refused", off, word, protocol.ClockSkew)
	case off >= clockOff:
		d.add(warning, about, check, do, "its clock is %s %s this machine's", off, word)
	default:
		d.add(fine, about, check, "", "its clock is right")
	}
}

// checkController looks at each of the controllers' URLs, and asks the one that leads how it is.
func (d *doctor) checkController(ctx context.Context) {
	d.area = "controller"
	config := client.Config{CA: []byte(d.me.fleet.CA), Signer: d.me.signer, Name: d.me.Name}
	for _, url := range d.me.project.Settings.Controllers {
		ends, err := client.Probe(ctx, config, url)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			d.add(problem, url, "reachable", "", "%w", err)
		default:
			d.add(fine, url, "reachable", "", "it answers")
		}
		switch left := time.Until(ends); {
		case ends.IsZero():
		case left < certificateSoon:
			d.add(warning, url, "certificate", "enroll the controller again", "its certificate ends at %s", date(ends))
		default:
			d.add(fine, url, "certificate", "", "its certificate ends at %s", date(ends))
		}
	}
	if d.session == nil {
		d.add(notSeen, "controller", "health", "", "no controller answers: nothing is known of it, nor of the nodes")
		return
	}
	var h protocol.ControllerHealth
	asked := time.Now()
	err := d.session.Controller(ctx, protocol.ShowHealth, nil, &h)
	answered := time.Now()
	switch {
	case errors.Is(err, &protocol.Refusal{Code: protocol.Unknown}):
		d.add(warning, "controller", "version", "upgrade it", "it is older than this program, and does not tell how it is")
		return
	case err != nil:
		d.add(problem, "controller", "health", "look at its log: journalctl -u nix-infra-controller, on its machine", "it does not tell how it is: %w", err)
		return
	}
	d.version("controller", h.Version)
	switch {
	case h.Time.Before(asked):
		d.clock("controller", "clock", h.Time.Sub(asked))
	case h.Time.After(answered):
		d.clock("controller", "clock", h.Time.Sub(answered))
	default:
		d.clock("controller", "clock", 0)
	}
	d.store("etcd", h.Etcd)
	d.store("record", h.Records.Error)
	d.disk("controller", "make room on its machine", h.DiskFree, h.DiskTotal)
}

func (d *doctor) store(what, failed string) {
	if failed != "" {
		d.add(problem, "controller", what, "look at its log: journalctl -u nix-infra-controller, on its machine", "%s does not answer: %s", what, failed)
		return
	}
	d.add(fine, "controller", what, "", "%s answers", what)
}

// version compares a program's version with this one's.
func (d *doctor) version(about, theirs string) {
	switch own := protocol.Build(); {
	case theirs == "":
	case theirs != own:
		d.add(warning, about, "version", "upgrade the older one", "it runs %s, and this program is %s", theirs, own)
	default:
		d.add(fine, about, "version", "", "it runs %s, as this program", strings.TrimSpace(theirs))
	}
}
