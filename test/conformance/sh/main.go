// Command sh is the shell of the images that stand for upstream's busybox. Debian's busybox has its own shell's words, which a test reads, but drops
// environment variables whose names no shell can use, which others look for in what the shell starts; its bash keeps those.
package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"syscall"
)

// usable are the names of variables that a shell can use.
var usable = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

func main() {
	shell := "/bin/busybox"
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); !usable.MatchString(name) {
			shell = "/bin/bash"
		}
	}
	err := syscall.Exec(shell, os.Args, os.Environ())
	fmt.Fprintln(os.Stderr, "sh:", shell+":", err)
	os.Exit(127)
}
