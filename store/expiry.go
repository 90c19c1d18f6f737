package store

import (
	"strings"
	"time"

	"github.com/tidwall/btree"
)

// expiryItem is one record that expires.
type expiryItem struct {
	at     int64 // unix nanoseconds
	table  *Table
	record *Record
}

// expiryQueue orders all expiring records of the store by time. Guarded by Store.mu.
type expiryQueue struct {
	tree *btree.BTreeG[expiryItem]
}

func newExpiryQueue() expiryQueue {
	less := func(a, b expiryItem) bool {
		if a.at != b.at {
			return a.at < b.at
		}
		return strings.Compare(a.record.Key, b.record.Key) < 0
	}
	return expiryQueue{btree.NewBTreeGOptions(less, btree.Options{NoLocks: true})}
}

func (q *expiryQueue) add(t *Table, r *Record) {
	if !r.Expires.IsZero() {
		q.tree.Set(expiryItem{r.Expires.UnixNano(), t, r})
	}
}

func (q *expiryQueue) remove(t *Table, r *Record) {
	if !r.Expires.IsZero() {
		q.tree.Delete(expiryItem{r.Expires.UnixNano(), t, r})
	}
}

// isFirst says that no record expires before r, so that the keeper may have to wake up earlier than it thinks.
func (q *expiryQueue) isFirst(r *Record) bool {
	first, ok := q.tree.Min()
	return ok && first.record == r
}

// first returns when the next record expires.
func (q *expiryQueue) first() (time.Time, bool) {
	item, ok := q.tree.Min()
	return time.Unix(0, item.at), ok
}

// due returns at most expiryBatch deletions of records that have expired.
func (q *expiryQueue) due(now time.Time) []Op {
	var ops []Op
	q.tree.Scan(func(item expiryItem) bool {
		if item.at > now.UnixNano() || len(ops) == expiryBatch {
			return false
		}
		ops = append(ops, Op{Table: item.table, Key: item.record.Key, Expect: item.record.Revision})
		return true
	})
	return ops
}
