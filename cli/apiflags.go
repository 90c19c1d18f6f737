package cli

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	cliflag "k8s.io/component-base/cli/flag"

	"knarr/apiserver/options"
)

// helpColumns is the width of the help of commands with many flags.
const helpColumns = 120

// apiFlags are the flags that upstream's API server has, too.
type apiFlags struct {
	options *options.Options
	groups  cliflag.NamedFlagSets
}

func newAPIFlags() *apiFlags {
	a := &apiFlags{options: options.New()}
	a.groups.FlagSet("server") // first in the help
	a.options.Flags(&a.groups)
	return a
}

// each calls fn for every flag.
func (a *apiFlags) each(fn func(*pflag.Flag)) {
	for _, name := range a.groups.Order {
		a.groups.FlagSets[name].VisitAll(fn)
	}
}

// offer adds the flags to a command that has its own already, and groups all of them in its help.
func (a *apiFlags) offer(c *cobra.Command) {
	own := a.groups.FlagSet("server")
	c.Flags().VisitAll(func(f *pflag.Flag) { own.AddFlag(f) })
	a.each(func(f *pflag.Flag) {
		if c.Flags().Lookup(f.Name) == nil {
			c.Flags().AddFlag(f)
		}
	})
	cliflag.SetUsageAndHelpFunc(c, a.groups, helpColumns)
}

// check reports what is wrong with the flags and the files that they name; flags that nobody gave are right.
func (a *apiFlags) check() error {
	given := false
	a.each(func(f *pflag.Flag) { given = given || f.Changed })
	if !given {
		return nil
	}
	if err := a.options.Validate(); err != nil {
		return usageError{err}
	}
	return nil
}

// passedOn adds the flags to a command that hands them to a server which it starts. What is given is gathered in a form that holds in
// another directory and at a later start.
func passedOn(c *cobra.Command, given *[]string) {
	newAPIFlags().each(func(f *pflag.Flag) {
		f.Hidden = true
		f.Value = &recorder{Value: f.Value, name: f.Name, given: given}
		c.Flags().AddFlag(f)
	})
}

// recorder gathers what a flag is set to.
type recorder struct {
	pflag.Value
	name  string
	given *[]string
}

// Set implements pflag.Value.
func (r *recorder) Set(s string) error {
	if err := r.Value.Set(s); err != nil {
		return err
	}
	if r.isFile() && s != "" && s != "-" {
		abs, err := filepath.Abs(s)
		if err != nil {
			return err
		}
		s = abs
	}
	*r.given = append(*r.given, "--"+r.name+"="+s)
	return nil
}

// isFile tells flags that name a file.
func (r *recorder) isFile() bool {
	return r.Type() == "string" && slices.ContainsFunc([]string{"-file", "-config", "-path"}, func(end string) bool { return strings.HasSuffix(r.name, end) })
}

// mergeArgs gives the flags of before, each replaced where it is given now.
func mergeArgs(before, now []string) []string {
	flag := func(arg string) string { name, _, _ := strings.Cut(arg, "="); return name }
	var out []string
	for _, arg := range before {
		if !slices.ContainsFunc(now, func(other string) bool { return flag(other) == flag(arg) }) {
			out = append(out, arg)
		}
	}
	return append(out, now...)
}

// checkArgs is check for flags that passedOn gathered.
func checkArgs(args []string) error {
	if len(args) == 0 {
		return nil
	}
	a, set := newAPIFlags(), pflag.NewFlagSet("server", pflag.ContinueOnError)
	a.each(func(f *pflag.Flag) { set.AddFlag(f) })
	if err := set.Parse(args); err != nil {
		return usageError{err}
	}
	return a.check()
}
