package netns

import (
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	vns "github.com/vishvananda/netns"
)

// linkTimeout bounds how long a link with both ends up may take until it sends.
const linkTimeout = 2 * time.Second

// WaitUp returns when the link with this index, in the namespace ns that h talks to, really sends. The end of a veth that was brought up first gets its
// queue only when the kernel's link watcher has run, and drops everything until then: a connection made at once would wait a second for its retry.
// Since Linux 6.8 reading the link runs the watcher; before, its event is waited for.
func WaitUp(ns vns.NsHandle, h *netlink.Handle, index int) error {
	if up, err := isUp(h, index); up || err != nil {
		return err
	}
	events, done := make(chan netlink.LinkUpdate, 16), make(chan struct{})
	defer close(done)
	if err := netlink.LinkSubscribeWithOptions(events, done, netlink.LinkSubscribeOptions{Namespace: &ns}); err != nil {
		return fmt.Errorf("netns: watch links: %w", err)
	}
	if up, err := isUp(h, index); up || err != nil { // it may have come before the subscription
		return err
	}
	limit := time.NewTimer(linkTimeout)
	defer limit.Stop()
	for {
		select {
		case e, ok := <-events:
			if !ok {
				return fmt.Errorf("netns: watching links ended")
			}
			if int(e.Index) == index && e.Attrs().OperState == netlink.OperUp {
				return nil
			}
		case <-limit.C:
			return fmt.Errorf("netns: link %d is not up after %s", index, linkTimeout)
		}
	}
}

func isUp(h *netlink.Handle, index int) (bool, error) {
	l, err := h.LinkByIndex(index)
	if err != nil {
		return false, fmt.Errorf("netns: read link %d: %w", index, err)
	}
	return l.Attrs().OperState == netlink.OperUp, nil
}
