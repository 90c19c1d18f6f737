// Package sweep removes what pods leave behind, few at a time. Removing a small directory is work of the kernel from end to end: seventy pods that end together would keep seventy
// threads busy with it, and whatever else the processors are for, the API server of the same process first of all, would have to share them with those.
package sweep

import (
	"os"
	"runtime"
)

// slots are taken by removals that are under way: half of the processors.
var slots = make(chan struct{}, (runtime.NumCPU()+1)/2)

// RemoveAll is os.RemoveAll when it is its turn. It is for directories with few entries, of which none waits long for the others.
func RemoveAll(dir string) error {
	slots <- struct{}{}
	defer func() { <-slots }()
	return os.RemoveAll(dir)
}
