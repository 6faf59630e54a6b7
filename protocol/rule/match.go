package rule

import (
	"path"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/nix-infra/nix-infra/protocol"
)

// Match finds the first rule that allows a command to somebody of a role. Its error is a *protocol.Refusal: OverRole
// where nothing but the role is missing, and Denied otherwise, with the rule that was nearest and what of it was missed.
func Match(rules []Rule, argv []string, role protocol.Role) (*Allowed, error) {
	if err := checkArgv(argv); err != nil {
		return nil, err
	}
	var over *Rule
	var nearest *Rule
	var missed miss
	for i := range rules {
		r := &rules[i]
		if r.Program != argv[0] {
			continue
		}
		args, m := r.match(argv[1:])
		switch {
		case m == nil && role.AtLeast(r.Role):
			return &Allowed{Rule: *r, Argv: append([]string{r.Program}, args...)}, nil
		case m == nil:
			if over == nil || over.Role.AtLeast(r.Role) {
				over = r
			}
		case nearest == nil || missed.before(*m):
			nearest, missed = r, *m
		}
	}
	switch {
	case over != nil:
		return nil, protocol.Refuse(protocol.OverRole, "rule %q needs the role %s, you are %s", over.Name, over.Role, role)
	case nearest != nil:
		return nil, protocol.Refuse(protocol.Denied, "rule %q: %s", nearest.Name, missed.String())
	}
	return nil, unknownProgram(rules, argv[0])
}

// checkArgv refuses what can't be shown as it is, in any argument: no program needs it, and a record that misleads is none.
func checkArgv(argv []string) error {
	order := protocol.CommandOrder{Argv: argv}
	if err := order.Validate(); err != nil {
		return protocol.Refuse(protocol.Denied, "%v", err)
	}
	for i, a := range argv {
		if !utf8.ValidString(a) {
			return protocol.Refuse(protocol.Denied, "argument %d is not valid UTF-8", i)
		}
		for _, c := range a {
			if !unicode.IsPrint(c) { // of the spaces only U+0020 is
				return protocol.Refuse(protocol.Denied, "argument %d has the character %U in it, which can't be seen", i, c)
			}
		}
	}
	return nil
}

func unknownProgram(rules []Rule, program string) error {
	name := path.Base(program)
	for i := range rules {
		if name != program && rules[i].Program == name {
			return protocol.Refuse(protocol.Denied, "no rule allows %.80q: rule %q has %s without a folder", program, rules[i].Name, name)
		}
	}
	if why := never(name); why != "" {
		return protocol.Refuse(protocol.Denied, "no rule allows %.80q: %s", program, why)
	}
	return protocol.Refuse(protocol.Denied, "no rule allows %.80q: the node's policy can add one (\"commands\", docs/policy.md)", program)
}

// miss is why a command does not fit a rule.
type miss struct {
	at       int      // how many arguments fitted
	why      string   // for people
	known    bool     // it is one of what is denied with a reason
	expected []string // where a word does not fit: those that would
}

// before tells whether another miss is nearer to what was meant: it came further, or has a reason.
func (m miss) before(other miss) bool {
	return other.at > m.at || other.at == m.at && other.known && !m.known
}

func (m miss) String() string {
	if len(m.expected) > 0 {
		return m.why + strings.Join(m.expected, ", ")
	}
	return m.why
}

// match holds arguments against all forms, and returns them written anew.
func (r *Rule) match(args []string) ([]string, *miss) {
	forms := r.Forms
	if len(forms) == 0 {
		forms = []Form{{}}
	}
	patterns := make(map[string]*regexp.Regexp)
	var nearest *miss
	for i := range forms {
		p := parser{rule: r, form: &forms[i], args: args, patterns: patterns}
		m := p.run()
		switch {
		case m == nil:
			return p.out, nil
		case nearest == nil || nearest.before(*m):
			nearest = m
		case m.at == nearest.at && len(m.expected) > 0 && len(nearest.expected) > 0:
			nearest.expected = append(nearest.expected, m.expected...)
		}
	}
	return nil, nearest
}

// deniedWhy returns why there is no way to have an option or a word; "" of those that are not denied.
func (r *Rule) deniedWhy(name string) string {
	for _, d := range r.Denied {
		if slices.Contains(d.Names, name) {
			return d.Why
		}
	}
	return ""
}

// parser holds arguments against one form.
type parser struct {
	rule *Rule
	form *Form
	args []string

	at    int // index of the argument that is looked at
	words int // of the form's, how many came
	kind  int // index of the kind of operand that comes next
	taken int // operands of that kind
	given []*Option
	out   []string // the arguments so far, written anew
	front int      // where in out the defaults go

	patterns map[string]*regexp.Regexp // those that were compiled
}

func (p *parser) run() *miss {
	for ; p.at < len(p.args); p.at++ {
		arg := p.args[p.at]
		switch {
		case arg == "-":
			return p.miss(`"-" would be standard input, and there is none`)
		case arg == "--":
			return p.miss(`"--" has no use: no operand begins with "-"`)
		case strings.HasPrefix(arg, "-"):
			if m := p.options(arg); m != nil {
				return m
			}
		case p.words < len(p.form.Words):
			if m := p.word(arg); m != nil {
				return m
			}
		default:
			if m := p.operand(arg); m != nil {
				return m
			}
		}
	}
	if p.words < len(p.form.Words) {
		return &miss{at: p.at, why: "a subcommand is missing: ", expected: alternatives(p.form.Words[p.words])}
	}
	if what := p.missing(); what != "" {
		return p.miss("missing: " + what)
	}
	p.putDefaults()
	return nil
}

func (p *parser) miss(why string) *miss { return &miss{at: p.at, why: why} }

func alternatives(word string) []string { return strings.Split(word, "|") }

func (p *parser) word(arg string) *miss {
	if why := p.rule.deniedWhy(arg); why != "" {
		return &miss{at: p.at, why: show(arg) + " is refused: " + why, known: true}
	}
	expected := alternatives(p.form.Words[p.words])
	for _, w := range expected {
		if w == arg {
			p.words++
			p.out = append(p.out, arg)
			p.front = len(p.out)
			return nil
		}
	}
	return &miss{at: p.at, why: show(arg) + " is none of: ", expected: expected}
}

// operand holds an operand against the kinds that the form still has: each kind takes all that fit, up to its most.
func (p *parser) operand(arg string) *miss {
	var expected []string
	keptOut := false
	for ; p.kind < len(p.form.Operands); p.kind, p.taken = p.kind+1, 0 {
		k := &p.form.Operands[p.kind]
		if p.taken < max(k.Max, 1) {
			if p.fits(k.Pattern, k.Not, arg) {
				p.taken++
				p.out = append(p.out, arg)
				return nil
			}
			expected = append(expected, k.What)
			keptOut = keptOut || p.fits(k.Pattern, "", arg)
		}
		if p.taken < k.Min {
			break
		}
	}
	if why := p.rule.deniedWhy(arg); why != "" {
		return &miss{at: p.at, why: show(arg) + " is refused: " + why, known: true}
	}
	if len(expected) == 0 {
		return p.miss(show(arg) + " is one word too many")
	}
	return &miss{at: p.at, why: show(arg) + ": expected " + strings.Join(expected, ", or "), known: keptOut}
}

// missing returns what kind of operand has not come as often as it must.
func (p *parser) missing() string {
	for ; p.kind < len(p.form.Operands); p.kind, p.taken = p.kind+1, 0 {
		if k := p.form.Operands[p.kind]; p.taken < k.Min {
			return k.What
		}
	}
	return ""
}

// putDefaults puts those defaults in front that the command does not have.
func (p *parser) putDefaults() {
	var front []string
	for _, d := range p.rule.Defaults {
		q := parser{rule: p.rule, form: p.form, args: []string{d}, patterns: p.patterns}
		if strings.HasPrefix(d, "-") && q.options(d) == nil && len(q.given) == 1 && !p.has(q.given[0]) {
			front = append(front, q.out...)
		}
	}
	p.out = append(p.out[:p.front:p.front], append(front, p.out[p.front:]...)...)
}

// show quotes what somebody sent, so that it stays in one line of a readable length.
func show(s string) string {
	const most = 80
	if runes := []rune(s); len(runes) > most {
		return `"` + string(runes[:most]) + `…"`
	}
	return `"` + s + `"`
}

// fits tells whether all of s is what pattern says, and not what not says. What is no pattern fits nothing.
func (p *parser) fits(pattern, not, s string) bool {
	is := p.compiled(pattern)
	if is == nil || !is.MatchString(s) {
		return false
	}
	if not == "" {
		return true
	}
	isNot := p.compiled(not)
	return isNot != nil && !isNot.MatchString(s)
}

func (p *parser) compiled(pattern string) *regexp.Regexp {
	re, known := p.patterns[pattern]
	if !known {
		re, _ = compile(pattern)
		p.patterns[pattern] = re
	}
	return re
}

// compile anchors a pattern. It must be whole by itself: "a)|(b" would leave its anchors.
func compile(pattern string) (*regexp.Regexp, error) {
	if _, err := syntax.Parse(pattern, syntax.Perl); err != nil {
		return nil, err
	}
	return regexp.Compile(`\A(?:` + pattern + `)\z`)
}
