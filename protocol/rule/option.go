package rule

import (
	"slices"
	"strings"
)

// options reads the options that are in an argument, and takes the next argument, too, where that is a value. It writes
// each in the one way that no program reads otherwise: by itself, and its value joined to it.
func (p *parser) options(arg string) *miss {
	switch {
	case p.rule.Style == Words:
		return p.wordOption(arg)
	case strings.HasPrefix(arg, "--"):
		return p.longOption(arg)
	}
	return p.shortOptions(arg)
}

// wordOption reads -name or -name VALUE.
func (p *parser) wordOption(arg string) *miss {
	o, m := p.option(arg)
	if m != nil {
		return m
	}
	p.out = append(p.out, arg)
	if o.Value == "" {
		return nil
	}
	value, m := p.nextValue(arg)
	if m == nil {
		m = p.checkValue(o, arg, value)
	}
	p.out = append(p.out, value)
	return m
}

// longOption reads --name, --name=VALUE or --name VALUE.
func (p *parser) longOption(arg string) *miss {
	name, value, joined := strings.Cut(arg, "=")
	o, m := p.option(name)
	switch {
	case m != nil:
		return m
	case joined && o.Value == "":
		return p.miss("option " + name + " has no value")
	case !joined && (o.Value == "" || o.Optional && !p.looseValue(o, &value)):
		p.out = append(p.out, name)
		return nil
	case !joined && !o.Optional:
		if value, m = p.nextValue(name); m != nil {
			return m
		}
	}
	p.out = append(p.out, name+"="+value)
	return p.checkValue(o, name, value)
}

// shortOptions reads -a, -abc, -aVALUE or -a VALUE.
func (p *parser) shortOptions(arg string) *miss {
	for i, letter := range arg[1:] {
		name := "-" + string(letter)
		o, m := p.option(name)
		if m != nil {
			return m
		}
		if o.Value == "" {
			p.out = append(p.out, name)
			continue
		}
		value := arg[1+i+len(string(letter)):]
		if value == "" {
			if o.Optional && !p.looseValue(o, &value) {
				p.out = append(p.out, name)
				return nil
			}
			if !o.Optional {
				if value, m = p.nextValue(name); m != nil {
					return m
				}
			}
		}
		p.out = append(p.out, name+value)
		return p.checkValue(o, name, value)
	}
	return nil
}

// option finds an option by a name, and counts it as given.
func (p *parser) option(name string) (*Option, *miss) {
	if why := p.rule.deniedWhy(name); why != "" {
		return nil, &miss{at: p.at, why: "option " + show(name) + " is refused: " + why, known: true}
	}
	for _, options := range [][]Option{p.rule.Options, p.form.Options} {
		for i := range options {
			o := &options[i]
			if !slices.Contains(o.Names, name) {
				continue
			}
			if p.has(o) && !o.Many {
				return nil, p.miss("option " + name + " is given more than once")
			}
			p.given = append(p.given, o)
			return o, nil
		}
	}
	return nil, p.miss("there is no option " + show(name) + p.inFull(name))
}

// inFull tells what an abbreviation could be short for.
func (p *parser) inFull(name string) string {
	for _, options := range [][]Option{p.rule.Options, p.form.Options} {
		for _, o := range options {
			for _, n := range o.Names {
				if len(name) > 2 && strings.HasPrefix(n, name) {
					return "; none is abbreviated: " + n + "?"
				}
			}
		}
	}
	return ""
}

func (p *parser) has(o *Option) bool {
	return slices.ContainsFunc(p.given, func(g *Option) bool { return g == o })
}

// nextValue takes the next argument.
func (p *parser) nextValue(name string) (string, *miss) {
	if p.at+1 == len(p.args) {
		return "", p.miss("option " + name + " has no value")
	}
	p.at++
	return p.args[p.at], nil
}

// looseValue takes the next argument where that can only be the option's value.
func (p *parser) looseValue(o *Option, value *string) bool {
	if !o.Loose || p.at+1 == len(p.args) || !p.fits(o.Value, o.Not, p.args[p.at+1]) {
		return false
	}
	p.at++
	*value = p.args[p.at]
	return true
}

// checkValue never takes an empty one: a program may take the next argument for it.
func (p *parser) checkValue(o *Option, name, value string) *miss {
	switch {
	case value != "" && p.fits(o.Value, o.Not, value):
		return nil
	case value != "" && p.fits(o.Value, "", value):
		return &miss{at: p.at, why: "option " + name + ": the rule keeps " + show(value) + " out", known: true}
	}
	return p.miss("option " + name + ": " + show(value) + " does not fit " + o.Value)
}
