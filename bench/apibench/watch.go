package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"

	"knarr/bench/load"
)

// The watch phases: so many events are to be seen in all, by changes of at most so many objects, by so many at once.
const (
	watchEvents  = 500_000
	watchChanges = 2000 // of 500, a phase of half a second, knarr's figure was one with a garbage collection in it or one without
	changers     = 4
	watchTimeout = 2 * time.Minute
	// maxFrame bounds an event, in bytes.
	maxFrame = 1 << 20
)

func (c *clients) decoder() runtime.Decoder { return scheme.Codecs.UniversalDeserializer() }

// fan is one watch phase: every watcher must see every change.
type fan struct {
	begin time.Time
	sent  []atomic.Int64 // when each object was changed, in nanoseconds after begin
	seen  atomic.Int64
	mu    sync.Mutex
	took  []time.Duration
}

// watch changes objects while many watch.
func (b *bench) watch(ctx context.Context, watchers int) error {
	ctx, cancel := context.WithTimeout(ctx, watchTimeout)
	defer cancel()
	changes := max(1, min(watchChanges, b.objects, watchEvents/watchers))
	streams, closeAll, err := b.openWatches(ctx, watchers)
	defer closeAll()
	if err != nil {
		return err
	}
	f := &fan{begin: time.Now(), sent: make([]atomic.Int64, changes)}
	var wg sync.WaitGroup
	cpu := b.watched.CPU()
	for _, s := range streams {
		wg.Go(func() { f.read(s, changes, b.framed()) })
	}
	changed := load.Run(ctx, "", nil, changes, changers, func(ctx context.Context, i int) error {
		f.sent[i].Store(int64(time.Since(f.begin)))
		patch := fmt.Sprintf(`{"data":{"other":"%d"}}`, f.begin.UnixNano())
		return b.patch(ctx, i, b.path("configmaps", mapName(i)), types.MergePatchType, []byte(patch))
	})
	stop := context.AfterFunc(ctx, closeAll)
	defer stop()
	wg.Wait()
	r := load.Result{Name: fmt.Sprintf("watch, %d watchers", watchers), Ops: int(f.seen.Load()), Elapsed: time.Since(f.begin), CPU: b.watched.Since(cpu),
		Memory: b.watched.Memory(), Errors: changed.Errors + changes*watchers - int(f.seen.Load()), First: changed.First}
	r.Set(f.took)
	b.print(r)
	if r.Errors > 0 {
		return fmt.Errorf("watch: %d changes failed (%s), %d events are missing", changed.Errors, changed.First, changes*watchers-r.Ops)
	}
	return nil
}

// openWatches opens the streams, several on each connection, from the present on. closeAll ends them and the connections.
func (b *bench) openWatches(ctx context.Context, n int) (out []io.ReadCloser, closeAll func(), err error) {
	var connections []*connection
	closeAll = func() {
		for _, s := range out {
			s.Close()
		}
		for _, c := range connections {
			c.close()
		}
	}
	list, err := b.CoreV1().ConfigMaps(b.namespace).List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return nil, closeAll, err
	}
	accept := asJSON
	if b.framed() {
		accept = protobuf + ";stream=watch"
	}
	for i := range n {
		if i%b.perWatcher == 0 {
			c, err := b.connection()
			if err != nil {
				return out, closeAll, err
			}
			connections = append(connections, c)
		}
		s, err := connections[i/b.perWatcher].Get().AbsPath(b.path("configmaps", "")).Param("watch", "true").
			Param("resourceVersion", list.ResourceVersion).SetHeader("Accept", accept).Stream(ctx)
		if err != nil {
			return out, closeAll, err
		}
		out = append(out, s)
	}
	return out, closeAll, nil
}

// framed says that events come with their length before them, as those in protobuf do.
func (c *clients) framed() bool { return c.config.ContentType == protobuf }

// read counts the events of a stream by their frames, and reads of each only which object it is about.
func (f *fan) read(s io.Reader, changes int, framed bool) {
	r := bufio.NewReader(s)
	took := make([]time.Duration, 0, changes)
	var buffer []byte
	for len(took) < changes {
		frame, err := nextFrame(r, framed, buffer)
		if err != nil {
			break
		}
		buffer = frame
		if i, ok := changedObject(frame); ok && i < changes {
			took = append(took, time.Since(f.begin)-time.Duration(f.sent[i].Load()))
		}
	}
	f.seen.Add(int64(len(took)))
	f.mu.Lock()
	f.took = append(f.took, took...)
	f.mu.Unlock()
}

// nextFrame reads one event: a line of JSON, or a length of four bytes and so many.
func nextFrame(r *bufio.Reader, framed bool, buffer []byte) ([]byte, error) {
	if !framed {
		buffer = buffer[:0]
		for {
			part, err := r.ReadSlice('\n')
			buffer = append(buffer, part...)
			if err != bufio.ErrBufferFull {
				return buffer, err
			}
		}
	}
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint32(head[:]))
	if n > maxFrame {
		return nil, fmt.Errorf("an event of %d bytes", n)
	}
	if cap(buffer) < n {
		buffer = make([]byte, n)
	}
	_, err := io.ReadFull(r, buffer[:n])
	return buffer[:n], err
}

// changedObject is the number of the ConfigMap that a MODIFIED event is about.
func changedObject(frame []byte) (int, bool) {
	if !bytes.Contains(frame[:min(len(frame), 64)], []byte("MODIFIED")) {
		return 0, false
	}
	_, rest, ok := bytes.Cut(frame, []byte("c-0"))
	if !ok || len(rest) < 5 {
		return 0, false
	}
	n, err := strconv.Atoi(string(rest[:5]))
	return n, err == nil
}
