package pebble

import (
	"context"
	"errors"

	"github.com/cockroachdb/pebble/v2"
)

// Read implements store.RawEngine.
func (e *Engine) Read(ctx context.Context, prefix string, fn func(key string, value []byte) error) error {
	upper := []byte(prefix)
	upper[len(upper)-1]++ // no key has the byte 0xff
	it, err := e.db.NewIterWithContext(ctx, &pebble.IterOptions{LowerBound: []byte(prefix), UpperBound: upper})
	if err != nil {
		return err
	}
	for ok := it.First(); ok; ok = it.Next() {
		entry, err := loadEntry(it)
		if err == nil {
			err = fn(entry.Key, entry.Value)
		}
		if err != nil {
			return errors.Join(err, it.Close())
		}
	}
	return it.Close()
}
