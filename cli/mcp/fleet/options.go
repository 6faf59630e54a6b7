package fleet

import (
	"regexp"
	"strings"
)

// Commands for systemctl and journalctl that mean what the agents have a question of their own for are asked as that: the answer
// has fields. To know what one means, all of it has to be understood; whatever is not known here is for the node's
// own program, by the node's policy.

// takes tells whether a value comes with an option.
type takes int

const (
	nothing takes = iota
	aValue
	perhaps // behind a =, or where the next word looks like one
)

// known is an option that is understood.
type known struct {
	name  string // its long name, without the dashes
	short byte   // 0: none
	takes takes
	looks *regexp.Regexp // of what takes a value perhaps
}

// option is one that was given.
type option struct{ name, value string }

// readOptions takes words apart as getopt does. It is not ok where there is something else than known options and operands.
func readOptions(words []string, all []known) (options []option, operands []string, ok bool) {
	for i := 0; i < len(words); i++ {
		word := words[i]
		next := func() (string, bool) {
			if i++; i < len(words) {
				return words[i], true
			}
			return "", false
		}
		switch {
		case word == "--":
			return nil, nil, false
		case strings.HasPrefix(word, "--"):
			name, value, given := strings.Cut(word[2:], "=")
			k := find(all, func(k *known) bool { return k.name == name })
			if k == nil || given && k.takes == nothing {
				return nil, nil, false
			}
			if k.takes == aValue && !given {
				if value, ok = next(); !ok {
					return nil, nil, false
				}
			}
			options = append(options, option{k.name, value})
		case len(word) > 1 && word[0] == '-':
			for at := 1; at < len(word); at++ {
				k := find(all, func(k *known) bool { return k.short == word[at] })
				if k == nil {
					return nil, nil, false
				}
				o := option{name: k.name}
				if k.takes != nothing {
					o.value, at = word[at+1:], len(word)
					if o.value == "" && (k.takes == aValue || i+1 < len(words) && k.looks.MatchString(words[i+1])) {
						if o.value, ok = next(); !ok {
							return nil, nil, false
						}
					}
				}
				options = append(options, o)
			}
		default:
			operands = append(operands, word)
		}
	}
	return options, operands, true
}

func find(all []known, is func(*known) bool) *known {
	for i := range all {
		if is(&all[i]) {
			return &all[i]
		}
	}
	return nil
}
