package nix

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Generation is one of the system profile: a system that was made the boot default once.
type Generation struct {
	Number  int
	Closure string // store path
	Created time.Time
}

// CurrentGeneration is the number of the system profile's current generation; 0 where it was never set.
func CurrentGeneration() (int, error) { return currentGeneration(SystemProfile) }

func currentGeneration(profile string) (int, error) {
	link, err := os.Readlink(profile)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	n := generationNumber(profile, path.Base(link))
	if n == 0 {
		return 0, fmt.Errorf("%s points to %q, which is no generation of it", profile, link)
	}
	return n, nil
}

// generationNumber reads PROFILE-N-link; 0 where the name is another.
func generationNumber(profile, name string) int {
	number, ok := strings.CutPrefix(name, path.Base(profile)+"-")
	number, ok2 := strings.CutSuffix(number, "-link")
	n, err := strconv.Atoi(number)
	if !ok || !ok2 || err != nil || n < 1 {
		return 0
	}
	return n
}

// Generations are those of the system profile, the newest first; none where it was never set. A link that names no
// store path is left out: nothing can boot it.
func Generations() ([]Generation, error) { return generations(SystemProfile) }

func generations(profile string) ([]Generation, error) {
	entries, err := os.ReadDir(path.Dir(profile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("can't list the generations: %w", err)
	}
	var all []Generation
	for _, entry := range entries {
		n := generationNumber(profile, entry.Name())
		info, err := entry.Info()
		if n == 0 || err != nil {
			continue
		}
		closure, err := os.Readlink(path.Join(path.Dir(profile), entry.Name()))
		if err != nil || CheckStorePath(closure) != nil {
			continue
		}
		// The link is made with the generation; what it leads to has the time of all of the store.
		all = append(all, Generation{Number: n, Closure: closure, Created: info.ModTime().UTC()})
	}
	slices.SortFunc(all, func(a, b Generation) int { return b.Number - a.Number })
	return all, nil
}

const deleteTimeout = 5 * time.Minute

// DeleteGenerations takes generations of the system profile away by their numbers; Nix refuses to delete the
// current one. Their closures stay until garbage is collected, and the boot loader goes on offering them until a
// system's switch-to-configuration boot is run.
func DeleteGenerations(ctx context.Context, numbers []int) error {
	if len(numbers) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, deleteTimeout)
	defer cancel()
	args := []string{"-p", SystemProfile, "--delete-generations"}
	for _, n := range numbers {
		if n < 1 { // to Nix, which knows other forms, it might mean more than one
			return fmt.Errorf("%d is no generation's number", n)
		}
		args = append(args, strconv.Itoa(n))
	}
	return job{what: "deleting generations", program: "nix-env", args: args}.run(ctx)
}

// CollectGarbage deletes every store path that nothing refers to, which may take many minutes. It tells how many
// there were and how many bytes that freed, as exactly as Nix says: to a hundredth of a MiB, or a tenth of a unit.
func CollectGarbage(ctx context.Context) (paths int, freed int64, err error) {
	out := &lines{}
	if err := (job{what: "collecting garbage", program: "nix-store", args: []string{"--gc"}, out: out}).run(ctx); err != nil {
		return 0, 0, err
	}
	out.flush()
	for _, line := range slices.Backward(out.tail) {
		if paths, freed, ok := parseFreed(line); ok {
			return paths, freed, nil
		}
	}
	return 0, 0, errors.New("garbage was collected, and Nix did not say how much")
}

// freedLine is libmain's PrintFreed: "12 store paths deleted, 3.45 MiB freed", from 2.33 on in units that fit.
var freedLine = regexp.MustCompile(`^(\d{1,9}) store paths deleted, +(\d{1,12}(?:\.\d{1,6})?) ([KMGTP])iB freed`)

func parseFreed(line string) (paths int, freed int64, ok bool) {
	m := freedLine.FindStringSubmatch(line)
	if m == nil {
		return 0, 0, false
	}
	paths, err1 := strconv.Atoi(m[1])
	amount, err2 := strconv.ParseFloat(m[2], 64)
	unit := float64(int64(1) << (10 * (1 + strings.Index("KMGTP", m[3]))))
	return paths, int64(amount * unit), err1 == nil && err2 == nil
}
