package rollout

import (
	"reflect"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
)

// members makes a fleet of "name:tag,tag" words; one that begins with "-" is offline.
func members(words string) []Member {
	var out []Member
	for _, word := range strings.Fields(words) {
		name, tags, _ := strings.Cut(word, ":")
		name, offline := strings.CutPrefix(name, "-")
		m := Member{Name: name, Offline: offline}
		if tags != "" {
			m.Tags = strings.Split(tags, ",")
		}
		out = append(out, m)
	}
	return out
}

func TestWaves(t *testing.T) {
	const ten = "j i h g f e d c b a"
	const tagged = "w3:web w1:web d2:db d1:db x2 x1 b1:db,web w2:web"
	for _, c := range []struct {
		name  string
		fleet string
		s     protocol.Strategy
		want  string // waves, split by |
	}{
		{"no nodes", "", protocol.Strategy{Canary: "1", Batch: "50%"}, ""},
		{"all at once, by name", "c a b", protocol.Strategy{}, "a b c"},
		{"canary, then the rest", ten, protocol.Strategy{Canary: "1"}, "a | b c d e f g h i j"},
		{"a share is rounded up", ten, protocol.Strategy{Canary: "11%"}, "a b | c d e f g h i j"},
		{"a share of 1% is a node", "a b c", protocol.Strategy{Canary: "1%"}, "a | b c"},
		{"canary of 0 is none", ten, protocol.Strategy{Canary: "0", Batch: "4"}, "a b c d | e f g h | i j"},
		{"canary of 0% is none", "a b", protocol.Strategy{Canary: "0%"}, "a b"},
		{"canary of more than there are", "a b", protocol.Strategy{Canary: "5", Batch: "1"}, "a b"},
		{"canary of all", "a b", protocol.Strategy{Canary: "100%"}, "a b"},
		{"batches", ten, protocol.Strategy{Batch: "3"}, "a b c | d e f | g h i | j"},
		{"batches of a share of the whole, rounded up", ten, protocol.Strategy{Canary: "10%", Batch: "31%"}, "a | b c d e | f g h i | j"},
		{"batch of 0 is all that are left", "a b c", protocol.Strategy{Canary: "1", Batch: "0%"}, "a | b c"},
		{"batch of more than there are", "a b", protocol.Strategy{Batch: "9"}, "a b"},
		{"by tag, the first that a node has", tagged, protocol.Strategy{Order: []string{"db", "web"}}, "b1 d1 d2 | w1 w2 w3 | x1 x2"},
		{"a node of two tags counts for the first said", tagged, protocol.Strategy{Order: []string{"web", "db"}}, "b1 w1 w2 w3 | d1 d2 | x1 x2"},
		{"batches don't mix tags", tagged, protocol.Strategy{Order: []string{"db", "web"}, Batch: "2"}, "b1 d1 | d2 | w1 w2 | w3 | x1 x2"},
		{"canary out of the first tag", tagged, protocol.Strategy{Order: []string{"web"}, Canary: "1"}, "b1 | w1 w2 w3 | d1 d2 x1 x2"},
		{"canary is smaller where the first tag is", tagged, protocol.Strategy{Order: []string{"db"}, Canary: "5", Batch: "4"}, "b1 d1 d2 | w1 w2 w3 x1 | x2"},
		{"the canary is one that is there", "-a b -c d", protocol.Strategy{Canary: "1", Batch: "2"}, "b | d a | c"},
		{"offline nodes are the last of their tag", "-d1:db d2:db w1:web -w0:web", protocol.Strategy{Order: []string{"db"}, Batch: "1"}, "d2 | d1 | w1 | w0"},
		{"a fleet that is offline", "-b -a", protocol.Strategy{Canary: "1"}, "a | b"},
		{"a tag that no node has", tagged, protocol.Strategy{Order: []string{"none", "db"}, Canary: "1"}, "b1 | d1 d2 | w1 w2 w3 x1 x2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			fleet := members(c.fleet)
			var waves []string
			for _, w := range Waves(fleet, c.s) {
				waves = append(waves, strings.Join(w, " "))
			}
			if got := strings.Join(waves, " | "); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
			if !reflect.DeepEqual(fleet, members(c.fleet)) {
				t.Error("the fleet was changed")
			}
		})
	}
}
