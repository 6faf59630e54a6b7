package rule

// Default returns the rules that every node has unless its policy says otherwise.
func Default() []Rule { return nil }
