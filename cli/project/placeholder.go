package project

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// placeholder is [%%key%%]: the shortest such text within a line, wherever it stands, comments included.
var placeholder = regexp.MustCompile(`\[%%(.*?)%%\]`)

// fill replaces each placeholder of a text by what value gives for its key, or leaves it as it is where
// that is false. What is filled in is not looked at again. before is the text in front of the placeholder.
func fill(text []byte, value func(line int, before []byte, key string) (string, bool)) []byte {
	matches := placeholder.FindAllSubmatchIndex(text, -1)
	if matches == nil {
		return text
	}
	var out bytes.Buffer
	line, done := 1, 0
	for _, m := range matches {
		line += bytes.Count(text[done:m[0]], []byte("\n"))
		out.Write(text[done:m[0]])
		if v, ok := value(line, text[:m[0]], string(text[m[2]:m[3]])); ok {
			out.WriteString(v)
		} else {
			out.Write(text[m[0]:m[1]])
		}
		done = m[1]
	}
	out.Write(text[done:])
	return out.Bytes()
}

// stateVersion is what stands before the value of system.stateVersion, and of others of that name, such as
// home-manager's. It says with which version a machine was new, so that it is never raised.
var stateVersion = regexp.MustCompile(`\bstateVersion\s*=\s*"$`)

// slot is a kind of file; each has placeholders of its own.
type slot int

const (
	baseSlot    slot = iota // configuration.nix
	flakeSlot               // flake.nix
	typeSlot                // the node type of a cluster
	controlSlot             // node_types/control_node.nix
	nodeSlot                // nodes/<node>.nix
)

var slotNames = map[slot]string{
	baseSlot: "configuration.nix", flakeSlot: "flake.nix", typeSlot: "node types of a cluster",
	controlSlot: "node_types/control_node.nix", nodeSlot: "nodes/*.nix",
}

// fixedKeys are the placeholders that name no node and no secret, and where they are filled in.
var fixedKeys = []struct {
	key   string
	slots []slot
	value func(*composer) (string, error)
}{
	{"sshKey", []slot{baseSlot}, (*composer).sshKey},
	{"nodeName", []slot{baseSlot, flakeSlot}, (*composer).nodeName},
	{versionKey, []slot{baseSlot, flakeSlot}, (*composer).nixVersion},
	{"hwArch", []slot{flakeSlot}, (*composer).hwArch},
	{"etcdCluster", []slot{typeSlot, controlSlot}, (*composer).etcdCluster},
	{"etcdClusterToken", []slot{controlSlot}, (*composer).etcdClusterToken},
	{"localhost.hostname", []slot{nodeSlot}, (*composer).nodeName},
	{"localhost.ipv4", []slot{nodeSlot}, func(c *composer) (string, error) { return c.ipv4(c.Node) }},
	{"localhost.overlayIp", []slot{nodeSlot}, func(c *composer) (string, error) { return c.overlayIP(c.Node) }},
	{"nix-store.trusted-public-keys", []slot{nodeSlot}, (*composer).trustedKeys},
}

const (
	versionKey     = "nixVersion"
	secretPrefix   = "secrets/"
	preBuildPrefix = "pre-build-secrets/"
	ipv4Suffix     = ".ipv4"
	overlaySuffix  = ".overlayIp"
)

// unknownError is a key that means nothing in its file, and what was probably meant.
type unknownError struct{ hint string }

func (e unknownError) Error() string { return e.hint }

// resolve gives the value of a key in a file of kind s: pre-build secrets, secrets, the table, and else an
// unknownError.
func (c *composer) resolve(s slot, key string) (string, error) {
	if s == nodeSlot {
		if rest, ok := strings.CutPrefix(key, preBuildPrefix); ok {
			return secretName(rest)
		}
		if rest, ok := strings.CutPrefix(key, secretPrefix); ok {
			return secretName(rest)
		}
	}
	for _, k := range fixedKeys {
		if k.key == key && slices.Contains(k.slots, s) {
			return k.value(c)
		}
	}
	if s == nodeSlot {
		if node, ok := strings.CutSuffix(key, ipv4Suffix); ok && c.known(node) {
			return c.ipv4(node)
		}
		if node, ok := strings.CutSuffix(key, overlaySuffix); ok && c.known(node) {
			return c.overlayIP(node)
		}
	}
	return "", unknownError{c.hint(s, key)}
}

// Fill fills in the placeholders of a text that goes to one node and is no Nix code: a variable of an action, the value of
// a secret. They are those of the node's own file; but [%%secrets/NAME%%] is the secret's value, as secret reads it. Without
// secret there are none. All mistakes are reported together, a line each.
func (p *Project) Fill(r TreeRequest, text string, secret func(name string) (string, error)) (string, error) {
	c, err := p.newComposer(r)
	if err != nil {
		return "", err
	}
	filled := fill([]byte(text), func(_ int, _ []byte, key string) (string, bool) {
		value, err := c.resolve(nodeSlot, key)
		if strings.HasPrefix(key, secretPrefix) || strings.HasPrefix(key, preBuildPrefix) {
			switch {
			case err != nil:
			case secret == nil:
				err = errors.New("no secret is filled in here")
			default:
				value, err = secret(value)
			}
		}
		if unknown := (unknownError{}); errors.As(err, &unknown) && c.AllowUnknownPlaceholders {
			return "", false
		}
		if err != nil {
			c.errs = append(c.errs, fmt.Errorf("placeholder [%%%%%s%%%%]: %w", show(key), err))
		}
		return value, err == nil
	})
	return string(filled), errors.Join(c.errs...)
}

// hint helps with a key that a file of kind s does not have.
func (c *composer) hint(s slot, key string) string {
	var here, elsewhere []string
	for _, k := range fixedKeys {
		if slices.Contains(k.slots, s) {
			here = append(here, k.key)
		} else if k.key == key {
			for _, other := range k.slots {
				elsewhere = append(elsewhere, slotNames[other])
			}
		}
	}
	node, isAddress := strings.CutSuffix(key, ipv4Suffix)
	if !isAddress {
		node, isAddress = strings.CutSuffix(key, overlaySuffix)
	}
	isSecret := strings.HasPrefix(key, secretPrefix) || strings.HasPrefix(key, preBuildPrefix)
	switch {
	case len(elsewhere) > 0:
		return "it is filled in in " + strings.Join(elsewhere, " and ") + " only"
	case s != nodeSlot && (isAddress || isSecret):
		return "it is filled in in " + slotNames[nodeSlot] + " only"
	case s == nodeSlot && isAddress && nearest(key, here) == "":
		return "no node " + show(node) + " is known" + hint(node, "nodes", c.nodeNames())
	case s == nodeSlot:
		here = append(here, secretPrefix+"NAME", preBuildPrefix+"NAME", "NODE"+ipv4Suffix, "NODE"+overlaySuffix)
	}
	return "nothing is filled in under this name" + hint(key, "names", here)
}

// nixString refuses a value that would end the Nix string that it is put into, or begin code in it.
func nixString(value string) error {
	for _, bad := range []string{`"`, "${", "''", `\`} {
		if strings.Contains(value, bad) {
			return fmt.Errorf("its value contains %s, which would break out of a Nix string", bad)
		}
	}
	if strings.HasSuffix(value, "$") || strings.HasPrefix(value, "'") || strings.HasSuffix(value, "'") {
		return errors.New("its value begins or ends with a quote or ends with $, which would break out of a Nix string")
	}
	for _, r := range value {
		if r < ' ' || r == 0x7f || r == '\ufffd' {
			return errors.New("its value is not one line of text")
		}
	}
	return nil
}
