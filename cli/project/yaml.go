package project

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

var (
	lineForm    = regexp.MustCompile(`(?s)^(?:yaml: )?line (\d+): (.*)$`)
	unknownForm = regexp.MustCompile(`^field (\S+) not found in type `)
	shapeForm   = regexp.MustCompile("(?s)^cannot unmarshal !!(\\w+)(?: `(.*)`)? into (.*)$")
)

// yamlError puts a decoder's errors into this project's form, file:line: text, one line each.
func yamlError(file string, err error) error {
	texts := []string{err.Error()}
	if several := new(yaml.TypeError); errors.As(err, &several) {
		texts = several.Errors
	}
	var errs []error
	for _, text := range texts {
		where := file
		if parts := lineForm.FindStringSubmatch(text); parts != nil {
			where, text = file+":"+parts[1], parts[2]
		}
		if parts := unknownForm.FindStringSubmatch(text); parts != nil {
			text = fmt.Sprintf("unknown key %q", parts[1])
		}
		if parts := shapeForm.FindStringSubmatch(text); parts != nil {
			text = wrongShape(parts[1], parts[2], parts[3])
		}
		errs = append(errs, fmt.Errorf("%s: %s", where, text))
	}
	return errors.Join(errs...)
}

// wrongShape says that a value is of another kind than its place takes: tag is YAML's word for it, goType Go's for the place.
func wrongShape(tag, value, goType string) string {
	got := show(value)
	switch {
	case tag == "seq":
		got = "a list"
	case tag == "map":
		got = "name: value"
	case value == "":
		got = "nothing"
	}
	want := "name: value"
	switch {
	case goType == "string":
		want = "text"
	case goType == "bool":
		want = "true or false"
	case strings.HasPrefix(goType, "int"):
		want = "a whole number"
	case strings.HasPrefix(goType, "[]"):
		want = "a list"
	}
	return fmt.Sprintf("%s stands where %s is expected", got, want)
}

// lineOf finds the line of the deepest part of path that the document has.
func lineOf(n *yaml.Node, path []string) int {
	line := max(n.Line, 1)
	for n.Kind == yaml.DocumentNode && len(n.Content) > 0 || n.Kind == yaml.AliasNode {
		if n.Kind == yaml.AliasNode {
			n = n.Alias
		} else {
			n = n.Content[0]
		}
	}
	if len(path) == 0 {
		return line
	}
	switch n.Kind {
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			if key, value := n.Content[i], n.Content[i+1]; key.Value == path[0] {
				return max(key.Line, lineOf(value, path[1:]))
			}
		}
	case yaml.SequenceNode:
		if i, err := strconv.Atoi(path[0]); err == nil && i < len(n.Content) {
			return lineOf(n.Content[i], path[1:])
		}
	}
	return line
}

// keepComments gives the parts of after the comments, and the braces and brackets, that they had before.
func keepComments(before, after *yaml.Node) {
	copyComments(before, after)
	if before.Kind == after.Kind && before.Kind != yaml.ScalarNode && len(before.Content) > 0 {
		after.Style = before.Style
	}
	if before.Kind != yaml.MappingNode || after.Kind != yaml.MappingNode {
		return
	}
	for i := 0; i+1 < len(after.Content); i += 2 {
		for j := 0; j+1 < len(before.Content); j += 2 {
			if before.Content[j].Value == after.Content[i].Value {
				copyComments(before.Content[j], after.Content[i])
				keepComments(before.Content[j+1], after.Content[i+1])
			}
		}
	}
}

func copyComments(from, to *yaml.Node) {
	to.HeadComment, to.LineComment, to.FootComment = from.HeadComment, from.LineComment, from.FootComment
}
