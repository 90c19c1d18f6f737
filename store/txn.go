package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
)

// maxTxnOps bounds the operations of one transaction.
const maxTxnOps = 4096

// Op is one operation of a transaction.
type Op struct {
	Table *Table
	Key   string // with the table's prefix
	// Object to store; nil deletes the key. It belongs to the store from the call of Txn on, also when Txn fails; its resourceVersion
	// is ignored and set.
	Object runtime.Object
	// Value is what the table's codec would make of Object, for a caller who has it already; nil: the codec is asked. It belongs to the
	// store from the call of Txn on.
	Value []byte
	// Expect is the revision that the key must have; 0: the key must not exist.
	Expect int64
	// TTL after which the object is deleted by itself; 0: never. Ignored for a deletion.
	TTL time.Duration
}

// preparedOp is what the store remembers of an Op while the engine works.
type preparedOp struct {
	table  *Table
	object runtime.Object
}

// Txn does all operations or none. It returns one record per operation, in order, each with its own revision, after all is as safe as the tables'
// classes say (the safest decides) and published. For a deletion the record is the deleted object with the deletion's revision.
//
// Errors: *ConflictError when an expectation does not hold, *UnavailableError when the engine cannot write (outcome unknown),
// ErrClosed, the codec's errors, and the context's when it ended before the engine was asked. Once the engine works on
// a transaction its outcome is waited for. The same key twice in one transaction is an error.
func (s *Store) Txn(ctx context.Context, ops ...Op) ([]*Record, error) {
	if len(ops) == 0 {
		return nil, nil
	}
	s.gate.RLock()
	defer s.gate.RUnlock()
	if s.closed {
		return nil, ErrClosed
	}
	p, err := s.propose(ctx, ops)
	if err != nil {
		return nil, err
	}
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		err := s.engine.Commit(ctx, p)
		if err == nil {
			return p.records, nil
		}
		var refused *RefusedError
		if !errors.As(err, &refused) {
			return nil, err
		}
		op := ops[refused.Index]
		current := op.Table.Get(op.Key)
		if revisionOf(current) != op.Expect {
			return nil, &ConflictError{Key: op.Key, Current: current}
		}
		// The key came to be as expected in the meantime: ask again.
	}
}

func revisionOf(r *Record) int64 {
	if r == nil {
		return 0
	}
	return r.Revision
}

// propose checks and encodes the operations.
func (s *Store) propose(ctx context.Context, ops []Op) (*Proposal, error) {
	if len(ops) > maxTxnOps {
		return nil, fmt.Errorf("store: %d operations in one transaction, at most %d are possible", len(ops), maxTxnOps)
	}
	p := &Proposal{Writes: make([]Write, len(ops))}
	prepared := make([]preparedOp, len(ops))
	if err := checkDistinct(ops); err != nil {
		return nil, err
	}
	for i := range ops {
		op, w := &ops[i], &p.Writes[i]
		if err := s.checkOp(op); err != nil {
			return nil, err
		}
		*w = Write{Key: op.Key, Prefix: op.Table.prefix, Class: op.Table.class, Delete: op.Object == nil, Expect: op.Expect, op: &prepared[i]}
		prepared[i] = preparedOp{table: op.Table, object: op.Object}
		if w.Delete {
			continue
		}
		if err := setRevision(op.Object, 0); err != nil {
			return nil, fmt.Errorf("store: %s: %w", op.Key, err)
		}
		if w.Value = op.Value; w.Value == nil {
			value, err := op.Table.codec.Encode(ctx, op.Key, op.Object)
			if err != nil {
				return nil, fmt.Errorf("store: encode %s: %w", op.Key, err)
			}
			w.Value = value
		}
		if op.TTL > 0 {
			w.Expires = s.clock.Now().Add(op.TTL).Round(0)
		}
	}
	return p, nil
}

// checkDistinct refuses a key that occurs twice.
func checkDistinct(ops []Op) error {
	if len(ops) == 1 {
		return nil
	}
	keys := make(map[string]struct{}, len(ops))
	for i := range ops {
		if _, twice := keys[ops[i].Key]; twice {
			return fmt.Errorf("store: key %s occurs twice in one transaction", ops[i].Key)
		}
		keys[ops[i].Key] = struct{}{}
	}
	return nil
}

// checkOp finds other mistakes of the caller.
func (s *Store) checkOp(op *Op) error {
	if op.Table == nil || op.Table.store != s {
		return fmt.Errorf("store: operation on %s names no table of this store", op.Key)
	}
	if op.Table.closed.Load() {
		return fmt.Errorf("store: table %s: %w", op.Table.prefix, ErrClosed)
	}
	if len(op.Key) <= len(op.Table.prefix) || !strings.HasPrefix(op.Key, op.Table.prefix) {
		return fmt.Errorf("store: key %q does not lie under %s", op.Key, op.Table.prefix)
	}
	if op.Object == nil && op.Expect == 0 {
		return fmt.Errorf("store: deletion of %s expects that it does not exist", op.Key)
	}
	return nil
}
