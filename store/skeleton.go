// Package store is the revisioned object store (being built: this file holds the signatures until the code lands).
package store

import (
	"context"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
)

type Store struct{}
type Table struct{}
type Snapshot struct{}
type Watch struct{}
type preparedOp struct{}

type Op struct {
	Table  *Table
	Key    string
	Object runtime.Object
	Expect int64
	TTL    time.Duration
}

type EventType uint8

const (
	Added EventType = iota + 1
	Modified
	Deleted
)

type Event struct {
	Type     EventType
	Revision int64
	Record   *Record
	Prev     *Record
}

func Open(ctx context.Context, o Options) (*Store, error) { panic("being built") }
func (s *Store) Close() error                             { panic("being built") }
func (s *Store) Revision() int64                          { panic("being built") }
func (s *Store) OpenTable(ctx context.Context, o TableOptions) (*Table, error) {
	panic("being built")
}
func (s *Store) CloseTable(prefix string)                              { panic("being built") } // watchers get ErrGone; the data stays in the engine
func (s *Store) Table(prefix string) *Table                            { panic("being built") } // nil: not open
func (s *Store) Tables() []*Table                                      { panic("being built") }
func (s *Store) Txn(ctx context.Context, ops ...Op) ([]*Record, error) { panic("being built") }
func (t *Table) Prefix() string                                        { panic("being built") }
func (t *Table) Revision() int64                                       { panic("being built") } // of the table's last change
func (t *Table) Get(key string) *Record                                { panic("being built") }
func (t *Table) Len() int                                              { panic("being built") }
func (t *Table) Snapshot() *Snapshot                                   { panic("being built") }
func (t *Table) SnapshotAt(rev int64) (*Snapshot, error)               { panic("being built") } // *GoneError, *FutureError
func (t *Table) Pin(sn *Snapshot)                                      { panic("being built") }
func (t *Table) AddIndex(name string, fn func(*Record) []string) error { panic("being built") } // error: the name is taken
func (t *Table) ByIndex(name, value string) []*Record                  { panic("being built") }
func (t *Table) IndexValues(name string) []string                      { panic("being built") }
func (t *Table) Watch(prefix string, from int64) (*Watch, error)       { panic("being built") }
func (sn *Snapshot) Revision() int64                                   { panic("being built") }
func (sn *Snapshot) Get(key string) *Record                            { panic("being built") }
func (sn *Snapshot) Len() int                                          { panic("being built") }
func (sn *Snapshot) Ascend(prefix, from string, fn func(*Record) bool) { panic("being built") }
func (w *Watch) Next(ctx context.Context) ([]Event, error)             { panic("being built") }
func (w *Watch) TryNext() ([]Event, error)                             { panic("being built") } // nil, nil: nothing now
func (w *Watch) Progress() int64                                       { panic("being built") }
func (w *Watch) Ready() <-chan struct{}                                { panic("being built") } // ask anew for each select
func (w *Watch) Stop()                                                 { panic("being built") }
