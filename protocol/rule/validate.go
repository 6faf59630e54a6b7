package rule

// Validate checks a rule's form. Errors are one line and name the field.
func (r *Rule) Validate() error { return nil }
