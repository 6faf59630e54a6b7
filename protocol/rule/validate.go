package rule

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/nix-infra/nix-infra/protocol"
)

// Limits of a rule.
const (
	maxText     = 256 // bytes, of a name or a reason
	maxPattern  = 512 // bytes
	maxForms    = 64
	maxWords    = 8   // of a form
	maxKinds    = 8   // of a form's operands
	maxOptions  = 128 // of a rule, and of a form
	maxNames    = 64  // of an option, or of what is denied
	maxDefaults = 16
	maxEnv      = 64
	maxGroups   = 16
	maxOutput   = 1 << 30 // bytes
)

var (
	programName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}$`)
	plainWord   = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$`)
	gnuOption   = regexp.MustCompile(`^(-[A-Za-z0-9]|--[A-Za-z0-9][A-Za-z0-9._-]{0,63})$`)
	wordOption  = regexp.MustCompile(`^-[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	envName     = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,127}$`)
	account     = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
)

// Validate checks a rule's form. Errors are one line and name the field.
func (r *Rule) Validate() error {
	switch {
	case !isText(r.Name):
		return fmt.Errorf("name: it is empty, has control characters, or more than %d bytes", maxText)
	case !programName.MatchString(r.Program) && (!path.IsAbs(r.Program) || path.Clean(r.Program) != r.Program || !isText(r.Program)):
		return fmt.Errorf("program %.80q: expected a name, or an absolute path without . and .. in it", r.Program)
	case !r.Role.AtLeast(protocol.Viewer):
		return fmt.Errorf("role %.80q: expected viewer, operator, deployer or admin", r.Role)
	case r.Style != GNU && r.Style != Words:
		return fmt.Errorf("style %.80q: expected none or %q", r.Style, Words)
	case len(r.Forms) > maxForms || len(r.Denied) > maxOptions || len(r.Defaults) > maxDefaults || len(r.Env) > maxEnv || len(r.Groups) > maxGroups:
		return fmt.Errorf("too many forms (%d are possible), denied (%d), defaults (%d), env (%d) or groups (%d)",
			maxForms, maxOptions, maxDefaults, maxEnv, maxGroups)
	case r.User != "" && !account.MatchString(r.User):
		return fmt.Errorf("user %.80q: that is no user's name", r.User)
	case r.Timeout < 0 || r.Timeout > protocol.MaxRunTime:
		return fmt.Errorf("timeout: %d s; up to %d are possible", r.Timeout, protocol.MaxRunTime)
	case r.Output < 0 || r.Output > maxOutput:
		return fmt.Errorf("output: %d bytes; up to %d are possible", r.Output, int64(maxOutput))
	}
	for _, g := range r.Groups {
		if !account.MatchString(g) {
			return fmt.Errorf("group %.80q: that is no group's name", g)
		}
	}
	if err := r.checkOptions(r.Options, nil); err != nil {
		return err
	}
	for i := range r.Forms {
		if err := r.checkForm(&r.Forms[i]); err != nil {
			return fmt.Errorf("form %d: %w", i+1, err)
		}
	}
	for _, d := range r.Denied {
		if len(d.Names) == 0 || len(d.Names) > maxNames || !allOf(d.Names, isText) || !isText(d.Why) {
			return fmt.Errorf("denied %.80q: names and a reason are expected, of up to %d bytes each", d.Names, maxText)
		}
	}
	for _, d := range r.Defaults {
		p := parser{rule: r, form: &Form{}, args: []string{d}, patterns: make(map[string]*regexp.Regexp)}
		if m := p.run(); m != nil || len(p.given) != 1 {
			return fmt.Errorf("default %.80q: it is not one of the rule's options in one word", d)
		}
	}
	return r.checkEnv()
}

func (r *Rule) checkForm(f *Form) error {
	if len(f.Words) > maxWords || len(f.Operands) > maxKinds {
		return fmt.Errorf("%d words and %d kinds of operands; %d and %d are possible", len(f.Words), len(f.Operands), maxWords, maxKinds)
	}
	for _, w := range f.Words {
		if len(w) > maxPattern || !allOf(alternatives(w), plainWord.MatchString) {
			return fmt.Errorf("word %.80q: expected a subcommand, or alternatives as in \"show|list\"", w)
		}
		if slices.ContainsFunc(alternatives(w), func(a string) bool { return r.deniedWhy(a) != "" }) {
			return fmt.Errorf("word %.80q: it is denied, too", w)
		}
	}
	for _, o := range f.Operands {
		switch {
		case !isText(o.What):
			return fmt.Errorf("operand %.80q: \"what\" has to say what it is", o.What)
		case o.Min < 0 || o.Max < 0 || o.Min > max(o.Max, 1) || o.Max > protocol.MaxArgs:
			return fmt.Errorf("operand %q: from %d to %d of it", o.What, o.Min, max(o.Max, 1))
		}
		if err := checkPatterns(o.Pattern, o.Not); err != nil {
			return fmt.Errorf("operand %q: %w", o.What, err)
		}
	}
	return r.checkOptions(f.Options, r.Options)
}

// checkOptions checks options beside others that are taken in the same place.
func (r *Rule) checkOptions(options, beside []Option) error {
	if len(options) > maxOptions {
		return fmt.Errorf("%d options; %d are possible", len(options), maxOptions)
	}
	var names []string
	for _, o := range beside {
		names = append(names, o.Names...)
	}
	spelled := gnuOption
	if r.Style == Words {
		spelled = wordOption
	}
	for _, o := range options {
		switch {
		case len(o.Names) == 0 || len(o.Names) > maxNames:
			return fmt.Errorf("an option has %d names; from 1 to %d are possible", len(o.Names), maxNames)
		case !allOf(o.Names, spelled.MatchString):
			return fmt.Errorf("option %.80q: expected -a or --name, or -name in the style %q", o.Names, Words)
		case slices.ContainsFunc(o.Names, func(n string) bool { return slices.Contains(names, n) }):
			return fmt.Errorf("option %.80q: it is there twice", o.Names)
		case o.Value == "" && (o.Not != "" || o.Optional), o.Loose && !o.Optional, o.Optional && r.Style == Words:
			return fmt.Errorf("option %.80q: \"not\" and \"optional\" need a value, \"loose\" needs \"optional\", which the style %q does not have", o.Names, Words)
		}
		if o.Value != "" {
			if err := checkPatterns(o.Value, o.Not); err != nil {
				return fmt.Errorf("option %.80q: %w", o.Names, err)
			}
		}
		for _, n := range o.Names {
			if r.deniedWhy(n) != "" {
				return fmt.Errorf("option %q: it is denied, too", n)
			}
		}
		names = append(names, o.Names...)
	}
	return nil
}

func (r *Rule) checkEnv() error {
	for _, v := range r.Env {
		switch {
		case !envName.MatchString(v.Name):
			return fmt.Errorf("env %.80q: that is no variable's name", v.Name)
		case len(v.Value) > 4096 || strings.ContainsFunc(v.Value, unicode.IsControl):
			return fmt.Errorf("env %s: its value has control characters, or more than 4096 bytes", v.Name)
		case v.IfExists && !path.IsAbs(v.Value):
			return fmt.Errorf("env %s: \"if_exists\" needs an absolute path", v.Name)
		}
	}
	return nil
}

func checkPatterns(patterns ...string) error {
	for i, p := range patterns {
		if i > 0 && p == "" {
			continue
		}
		if _, err := compile(p); p == "" || len(p) > maxPattern || err != nil {
			return fmt.Errorf("pattern %.80q: expected an RE2 expression of up to %d bytes", p, maxPattern)
		}
	}
	return nil
}

// isText tells whether s can be shown to people in a line.
func isText(s string) bool {
	return s != "" && len(s) <= maxText && !strings.ContainsFunc(s, unicode.IsControl)
}

func allOf(all []string, is func(string) bool) bool {
	return !slices.ContainsFunc(all, func(s string) bool { return !is(s) })
}
