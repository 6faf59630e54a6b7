package rule

import "errors"

// Split makes the words of a text.
func Split(text string) ([]string, error) { return nil, errors.New("not yet") }

// SplitPipes makes the words of each command of a pipeline.
func SplitPipes(text string) ([][]string, error) { return nil, errors.New("not yet") }

// ShellSyntax is the error of Split and SplitPipes for a text that only a shell could carry out.
type ShellSyntax struct {
	Char    rune   // the character that a shell would act on
	At      int    // its position in the text, in characters, from 1
	Meaning string // what a shell would do there
	Instead string // what to do
}

func (e *ShellSyntax) Error() string { return e.Meaning }
