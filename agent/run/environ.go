package run

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

// environ is what every run finds: where programs are, and that nobody is there to be asked, to scroll, or to see colours.
func environ(more []string) []string {
	env := []string{"PATH=" + nix.SearchPath(), "LANG=C.UTF-8", "TERM=dumb", "PAGER=cat", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0", "SYSTEMD_URLIFY=0"}
	if locales, ok := os.LookupEnv("LOCALE_ARCHIVE"); ok {
		env = append(env, "LOCALE_ARCHIVE="+locales)
	}
	return append(env, more...)
}

var envName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// What makes a program run, load or read something else than it would is no value for it: names, and how names begin.
var (
	steering = []string{"PATH", "HOME", "SHELL", "ENV", "IFS", "CDPATH", "PS4", "PROMPT_COMMAND", "SHELLOPTS", "GLOBIGNORE", "EXECIGNORE", "FUNCNEST",
		"POSIXLY_CORRECT", "PAGER", "EDITOR", "VISUAL", "BROWSER", "TMPDIR", "TERMINFO", "LOCPATH", "NLSPATH", "HOSTALIASES", "RES_OPTIONS",
		"PERLLIB", "RUBYOPT", "RUBYLIB", "NODE_OPTIONS", "NODE_PATH", "CLASSPATH", "JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS",
		"OPENSSL_CONF", "OPENSSL_MODULES", "OPENSSL_ENGINES", "LUA_INIT", "LUA_PATH", "LUA_CPATH", "PSQLRC", "MYSQL_HOME"}
	steeringPrefixes = []string{"LD_", "DYLD_", "BASH", "GCONV_", "GLIBC_", "MALLOC_", "PYTHON", "PERL5", "GIT_", "NIX_", "SYSTEMD_", "LESS"}
)

// CheckPrivate checks an environment that somebody gave: names that are none, that would change what is run, and values
// that systemd can't hand over are refused.
func CheckPrivate(env map[string]string) error {
	size := 0
	for _, name := range slices.Sorted(maps.Keys(env)) {
		value := env[name]
		size += len(name) + len(value) + 2
		switch {
		case !envName.MatchString(name):
			return fmt.Errorf("%.80q can't be the name of a variable: use letters, digits and _, the first no digit", name)
		case len(name) > 128:
			return fmt.Errorf("the name of variable %.80q… has %d characters, 128 are possible", name, len(name))
		case slices.Contains(steering, name) || slices.ContainsFunc(steeringPrefixes, func(p string) bool { return strings.HasPrefix(name, p) }):
			return fmt.Errorf("variable %s can't be set: it changes which programs run, or how; choose another name", name)
		}
		// Never the value: it may be a secret.
		if i := strings.IndexFunc(value, notText); i >= 0 || !utf8.ValidString(value) {
			return fmt.Errorf("the value of variable %s can't be handed over: it has a NUL, or what is no character; encode it, for example in base64", name)
		}
	}
	if size > protocol.MaxEnvSize {
		return fmt.Errorf("the environment has %d bytes, %d are possible", size, protocol.MaxEnvSize)
	}
	return nil
}

// notText tells whether systemd takes a rune for no text: NUL, and the code points that are no characters.
func notText(r rune) bool {
	return r == 0 || r >= 0xFDD0 && r <= 0xFDEF || r&0xFFFE == 0xFFFE
}

// environmentFile writes an environment in the form of systemd's EnvironmentFile=. Between double quotes everything stands
// for itself, lines too, but for the four characters that a backslash escapes.
func environmentFile(env map[string]string) []byte {
	escape := strings.NewReplacer(`"`, `\"`, `\`, `\\`, `$`, `\$`, "`", "\\`")
	var file strings.Builder
	for _, name := range slices.Sorted(maps.Keys(env)) {
		file.WriteString(name + `="` + escape.Replace(env[name]) + "\"\n")
	}
	return []byte(file.String())
}
