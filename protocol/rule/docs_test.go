package rule

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestDocumented wants each default rule's program in the list of docs/policy.md.
func TestDocumented(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "policy.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, list, begins := strings.Cut(string(text), "### The default rules")
	list, _, ends := strings.Cut(list, "What there is no way through")
	if !begins || !ends {
		t.Fatal("the list is not where it was")
	}
	for _, r := range Default() {
		if !strings.Contains(list, "`"+r.Program+"`") {
			t.Errorf("%s is not in the list", r.Name)
		}
	}
}
