package netns

import (
	"errors"

	"github.com/vishvananda/netlink"
)

// maxDumps bounds how often a list that changes while the kernel reports it is asked for. Each attempt takes well under a millisecond, so that many
// interrupted ones in a row mean a machine on which links or routes never rest.
const maxDumps = 50

// Dump returns what list returns, a list of the kernel's links, addresses or routes that is complete: a list that changed while the kernel wrote it,
// because somebody else made or deleted a link, is asked for again. After maxDumps such lists the last one is returned with netlink.ErrDumpInterrupted.
// Source: NLM_F_DUMP_INTR of netlink(7).
func Dump[T any](list func() ([]T, error)) (found []T, err error) {
	for range maxDumps {
		if found, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return found, err
		}
	}
	return found, err
}
