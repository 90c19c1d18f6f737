package image

import (
	"context"
	"sync"
)

// keyedMutex is a mutex per key; a key costs memory only while it is locked or waited for. The zero value is ready.
// It implements unpack.KeyedLocker.
type keyedMutex struct {
	mu    sync.Mutex
	locks map[string]*keyLock
}

type keyLock struct {
	slot  chan struct{} // holds one token while locked
	users int           // holders and waiters; guarded by keyedMutex.mu
}

// Lock locks key, or returns the error of ctx when that ends first.
func (m *keyedMutex) Lock(ctx context.Context, key string) error {
	m.mu.Lock()
	l := m.locks[key]
	if l == nil {
		if m.locks == nil {
			m.locks = map[string]*keyLock{}
		}
		l = &keyLock{slot: make(chan struct{}, 1)}
		m.locks[key] = l
	}
	l.users++
	m.mu.Unlock()
	select {
	case l.slot <- struct{}{}:
		return nil
	case <-ctx.Done():
		m.leave(key, l)
		return context.Cause(ctx)
	}
}

// Unlock unlocks key, which the caller must have locked.
func (m *keyedMutex) Unlock(key string) {
	m.mu.Lock()
	l := m.locks[key]
	m.mu.Unlock()
	<-l.slot
	m.leave(key, l)
}

func (m *keyedMutex) leave(key string, l *keyLock) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if l.users--; l.users == 0 {
		delete(m.locks, key)
	}
}
