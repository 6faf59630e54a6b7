package rule

// Default returns the rules that every node has unless its policy says otherwise.
func Default() []Rule { return nil }

// never says of programs that no default rule has why that is so.
var never = map[string]string{}
