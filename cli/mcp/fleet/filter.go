package fleet

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// filter is what stands behind a |: it makes other lines of a node's output. The few that people use are here, in this
// process. Programs of this machine are not run: who asks is not the one who owns it.
type filter func(lines []string) []string

// filters makes the filters of a pipeline.
func filters(commands [][]string) ([]filter, error) {
	var all []filter
	for _, argv := range commands {
		make, ok := map[string]func(*words) (filter, error){"grep": grep, "head": head, "tail": tail, "wc": count, "sort": sorted, "uniq": unique}[argv[0]]
		if !ok {
			return nil, fmt.Errorf("%.80q: behind a | there are only grep, head, tail, sort, uniq and wc -l, which this server has itself", argv[0])
		}
		w, err := readWords(argv)
		if err != nil {
			return nil, err
		}
		f, err := make(w)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", argv[0], err)
		}
		if len(w.flags) > 0 || len(w.rest) > 0 {
			return nil, fmt.Errorf("%s: %.80q is not among what this server knows of it", argv[0], append(w.flags, w.rest...)[0])
		}
		all = append(all, f)
	}
	return all, nil
}

// words are the words of a filter, which take apart what it knows.
type words struct {
	flags []string // letters, each by itself; the value of n is in number
	n     int      // of -n 5, -n5 or -5; -1: none
	rest  []string
}

func readWords(argv []string) (*words, error) {
	w := &words{n: -1}
	args := argv[1:]
	for i := 0; i < len(args); i++ {
		a := args[i]
		switch {
		case a == "--":
			w.rest = append(w.rest, args[i+1:]...)
			return w, nil
		case len(a) < 2 || a[0] != '-':
			w.rest = append(w.rest, a)
		case strings.HasPrefix(a, "--"):
			return nil, fmt.Errorf("%s: %.80q: this server knows short options only", argv[0], a)
		case (argv[0] == "head" || argv[0] == "tail") && a != "-n":
			a = strings.TrimPrefix(a[1:], "n")
			n, err := strconv.Atoi(a)
			if err != nil || n < 0 {
				return nil, fmt.Errorf("%s: %.80q: use -n and a number of lines", argv[0], args[i])
			}
			w.n = n
		case (argv[0] == "head" || argv[0] == "tail") && i+1 < len(args):
			i++
			n, err := strconv.Atoi(args[i])
			if err != nil || n < 0 {
				return nil, fmt.Errorf("%s: -n %.80q: use a number of lines", argv[0], args[i])
			}
			w.n = n
		default:
			for _, letter := range a[1:] {
				w.flags = append(w.flags, string(letter))
			}
		}
	}
	return w, nil
}

// has takes a flag out, and tells whether it was there.
func (w *words) has(flag string) bool {
	before := len(w.flags)
	w.flags = slices.DeleteFunc(w.flags, func(f string) bool { return f == flag })
	return len(w.flags) < before
}

// grep keeps lines that match a pattern. With -F it is a text; else RE2, of which extended patterns are a part, so that no
// pattern takes long.
func grep(w *words) (filter, error) {
	if len(w.rest) != 1 {
		return nil, fmt.Errorf("it takes one pattern")
	}
	pattern := w.rest[0]
	w.rest = nil
	fixed, fold, invert, counted, whole := w.has("F"), w.has("i"), w.has("v"), w.has("c"), w.has("w")
	w.has("E") // it is
	if fixed {
		pattern = regexp.QuoteMeta(pattern)
	}
	if whole {
		pattern = `\b(?:` + pattern + `)\b`
	}
	if fold {
		pattern = "(?i)" + pattern
	}
	re, err := regexp.Compile(pattern)
	if err != nil {
		return nil, err
	}
	return func(lines []string) []string {
		lines = slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return re.MatchString(l) == invert })
		if counted {
			return []string{strconv.Itoa(len(lines))}
		}
		return lines
	}, nil
}

func (w *words) lines() int {
	if w.n < 0 {
		return 10
	}
	return w.n
}

func head(w *words) (filter, error) {
	return func(lines []string) []string { return lines[:min(len(lines), w.lines())] }, nil
}

func tail(w *words) (filter, error) {
	return func(lines []string) []string { return lines[max(0, len(lines)-w.lines()):] }, nil
}

func count(w *words) (filter, error) {
	if !w.has("l") {
		return nil, fmt.Errorf("use wc -l")
	}
	return func(lines []string) []string { return []string{strconv.Itoa(len(lines))} }, nil
}

// sorted sorts lines: by their bytes or, with -n, by the number that they begin with.
func sorted(w *words) (filter, error) {
	reverse, numbers, once := w.has("r"), w.has("n"), w.has("u")
	return func(lines []string) []string {
		lines = slices.Clone(lines)
		slices.SortStableFunc(lines, func(a, b string) int {
			order := strings.Compare(a, b)
			if x, y := leading(a), leading(b); numbers && x != y {
				order = 1
				if x < y {
					order = -1
				}
			}
			if reverse {
				return -order
			}
			return order
		})
		if once {
			lines = slices.Compact(lines)
		}
		return lines
	}, nil
}

var leadingNumber = regexp.MustCompile(`^\s*-?[0-9]+(\.[0-9]+)?`)

func leading(line string) float64 {
	n, _ := strconv.ParseFloat(strings.TrimSpace(leadingNumber.FindString(line)), 64)
	return n
}

// unique leaves out lines that are as the one before; with -c each has how many there were in front.
func unique(w *words) (filter, error) {
	counted := w.has("c")
	return func(lines []string) []string {
		var some []string
		for i := 0; i < len(lines); {
			n := i + 1
			for n < len(lines) && lines[n] == lines[i] {
				n++
			}
			if counted {
				some = append(some, fmt.Sprintf("%7d %s", n-i, lines[i]))
			} else {
				some = append(some, lines[i])
			}
			i = n
		}
		return some
	}, nil
}

// through passes output through filters.
func through(all []filter, output []byte) []byte {
	if len(all) == 0 {
		return output
	}
	var lines []string
	for l := range bytes.Lines(output) {
		lines = append(lines, strings.TrimSuffix(string(l), "\n"))
	}
	for _, f := range all {
		lines = f(lines)
	}
	if len(lines) == 0 {
		return nil
	}
	return []byte(strings.Join(lines, "\n") + "\n")
}
