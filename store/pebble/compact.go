package pebble

import (
	"sync"

	"github.com/cockroachdb/pebble/v2"
)

// maxCompactions is the number of compactions at a time.
const maxCompactions = 1

// compactor grants Pebble its compactions, maxCompactions at a time, the next when one is done. Pebble's own scheduler does the same
// and looks ten times a second whether the limit has changed; here it never does.
type compactor struct {
	db pebble.DBForCompaction

	mu       sync.Mutex
	running  int
	granting bool
	idle     *sync.Cond // signalled when granting ends
	stopped  bool
}

func newCompactor() *compactor {
	c := &compactor{}
	c.idle = sync.NewCond(&c.mu)
	return c
}

// Register implements pebble.CompactionScheduler.
func (c *compactor) Register(_ int, db pebble.DBForCompaction) { c.db = db }

// Unregister implements pebble.CompactionScheduler.
func (c *compactor) Unregister() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	for c.granting {
		c.idle.Wait()
	}
}

// TrySchedule implements pebble.CompactionScheduler.
func (c *compactor) TrySchedule() (bool, pebble.CompactionGrantHandle) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopped || c.running >= maxCompactions {
		return false, nil
	}
	c.running++
	return true, c
}

// UpdateGetAllowedWithoutPermission implements pebble.CompactionScheduler.
func (c *compactor) UpdateGetAllowedWithoutPermission() {}

// Started implements pebble.CompactionGrantHandle.
func (c *compactor) Started() {}

// MeasureCPU implements pebble.CompactionGrantHandle.
func (c *compactor) MeasureCPU(pebble.CompactionGoroutineKind) {}

// CumulativeStats implements pebble.CompactionGrantHandle.
func (c *compactor) CumulativeStats(pebble.CompactionGrantHandleStats) {}

// Done implements pebble.CompactionGrantHandle: the freed place goes to a waiting compaction.
func (c *compactor) Done() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.running--
	for c.granting {
		c.idle.Wait()
	}
	if c.stopped || c.running >= maxCompactions {
		return
	}
	c.granting = true
	c.running++
	c.mu.Unlock()
	accepted := false
	if waiting, _ := c.db.GetWaitingCompaction(); waiting {
		accepted = c.db.Schedule(c)
	}
	c.mu.Lock()
	if !accepted {
		c.running--
	}
	c.granting = false
	c.idle.Broadcast()
}
