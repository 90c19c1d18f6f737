// Package cli holds the commands of the knarr program. They start, stop and look at clusters from the outside: by what
// lies in a cluster's directory, by what the kernel has under its name, and by its API. The parts of a cluster itself come
// in through the System interface.
package cli
