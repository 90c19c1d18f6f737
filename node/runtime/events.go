package runtime

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"knarr/node/shim"
)

const (
	// eventBuffer bounds how many events a subscriber may be behind.
	eventBuffer = 1024
	// eventBacklog bounds the events kept for the first subscriber.
	eventBacklog = 512
	// keepTTYLimit bounds the time to give a terminal to a new shim.
	keepTTYLimit = 10 * time.Second
)

// errBehind ends a subscription; the subscriber lists and subscribes again.
var errBehind = status.Error(codes.ResourceExhausted, "the reader of container events is too far behind")

// eventHub gives events to subscribers. Until the first one comes it keeps
// them, so that what happened while no agent ran reaches the agent.
type eventHub struct {
	mu      sync.Mutex
	subs    map[chan *runtimeapi.ContainerEventResponse]struct{}
	backlog []*runtimeapi.ContainerEventResponse
	opened  bool // somebody subscribed once
	closed  bool
}

func (h *eventHub) publish(e *runtimeapi.ContainerEventResponse) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.opened {
		if len(h.backlog) == eventBacklog {
			h.backlog = h.backlog[1:]
		}
		h.backlog = append(h.backlog, e)
		return
	}
	for sub := range h.subs {
		select {
		case sub <- e:
		default:
			close(sub)
			delete(h.subs, sub)
		}
	}
}

func (h *eventHub) subscribe() (chan *runtimeapi.ContainerEventResponse, []*runtimeapi.ContainerEventResponse) {
	h.mu.Lock()
	defer h.mu.Unlock()
	sub := make(chan *runtimeapi.ContainerEventResponse, eventBuffer)
	if h.closed {
		close(sub)
		return sub, nil
	}
	if h.subs == nil {
		h.subs = map[chan *runtimeapi.ContainerEventResponse]struct{}{}
	}
	h.subs[sub] = struct{}{}
	missed := h.backlog
	h.opened, h.backlog = true, nil
	return sub, missed
}

func (h *eventHub) unsubscribe(sub chan *runtimeapi.ContainerEventResponse) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.subs, sub)
}

func (h *eventHub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for sub := range h.subs {
		close(sub)
		delete(h.subs, sub)
	}
	h.closed = true
}

// wanted tells whether somebody will see an event.
func (h *eventHub) wanted() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return !h.opened || len(h.subs) > 0
}

// GetContainerEvents implements internalapi.ContainerManager: it sends to out
// until ctx ends. The first subscriber also gets what happened before it came.
// A subscriber that does not read is cut off with ResourceExhausted. The
// callback is called with nil, for there is no stream of grpc.
func (r *Runtime) GetContainerEvents(ctx context.Context, out chan *runtimeapi.ContainerEventResponse,
	established func(runtimeapi.RuntimeService_GetContainerEventsClient)) error {
	sub, missed := r.events.subscribe()
	defer r.events.unsubscribe(sub)
	if established != nil {
		established(nil)
	}
	send := func(e *runtimeapi.ContainerEventResponse) error {
		select {
		case out <- e:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-r.ctx.Done():
			return r.ctx.Err()
		}
	}
	for _, e := range missed {
		if err := send(e); err != nil {
			return rpcError(err)
		}
	}
	for {
		select {
		case e, more := <-sub:
			if !more {
				return errBehind
			}
			if err := send(e); err != nil {
				return rpcError(err)
			}
		case <-ctx.Done():
			return rpcError(ctx.Err())
		case <-r.ctx.Done():
			return rpcError(r.ctx.Err())
		}
	}
}

func (r *Runtime) emit(c *container, kind runtimeapi.ContainerEventType) {
	r.emitFor(c.id, c.rec.SandboxID, kind)
}

func (r *Runtime) emitSandbox(s *sandbox, kind runtimeapi.ContainerEventType) {
	r.emitFor(s.id, s.id, kind)
}

func (r *Runtime) emitFor(id, sandboxID string, kind runtimeapi.ContainerEventType) {
	if !r.events.wanted() {
		return
	}
	e := &runtimeapi.ContainerEventResponse{
		ContainerId: id, ContainerEventType: kind, CreatedAt: time.Now().UnixNano(),
	}
	if s, err := r.findSandbox(sandboxID); err == nil {
		e.PodSandboxStatus = s.status()
		for _, c := range r.containersOf(sandboxID) {
			e.ContainersStatuses = append(e.ContainersStatuses, c.criStatus())
		}
	}
	r.events.publish(e)
}

// watcher takes the shim's events.
type watcher struct{ r *Runtime }

// Snapshot implements shim.Watcher.
func (w *watcher) Snapshot(list []shim.Status) {
	known := map[string]bool{}
	for _, st := range list {
		known[st.ID] = true
		w.take(st)
	}
	w.r.mu.RLock()
	all := make([]*container, 0, len(w.r.containers))
	for _, c := range w.r.containers {
		all = append(all, c)
	}
	w.r.mu.RUnlock()
	for _, c := range all {
		if p, _ := c.snapshot(); p != phaseRunning {
			continue
		}
		if !known[c.id] {
			w.r.confirmLost(c)
			continue
		}
		w.r.returnTTY(c)
	}
}

// Event implements shim.Watcher.
func (w *watcher) Event(e shim.Event) {
	if e.Type == shim.EventStarted || e.Type == shim.EventExited {
		w.take(e.Status)
	}
}

func (w *watcher) take(st shim.Status) {
	if st.State == shim.StateStarting {
		return
	}
	w.r.mu.RLock()
	c := w.r.containers[st.ID]
	s := w.r.sandboxes[sandboxOfPause(st.ID)]
	w.r.mu.RUnlock()
	switch {
	case c != nil:
		w.r.apply(c, st)
	case s != nil && st.State == shim.StateExited:
		w.r.pauseEnded(s)
	}
}

// apply takes what the shim says of a container; it is idempotent and ignores
// what is older than what is known.
func (r *Runtime) apply(c *container, st shim.Status) {
	c.mu.Lock()
	before := c.phase
	news := false
	switch {
	case c.phase == phaseExited:
	case st.State == shim.StateExited:
		news = c.rec.Last == nil
		c.phase, c.last, c.rec.Last = phaseExited, st, &st
		close(c.ended)
		if c.tty != nil {
			_ = c.tty.Close()
			c.tty = nil
		}
	case st.State == shim.StateRunning:
		c.phase, c.last = phaseRunning, st
	}
	after := c.phase
	c.mu.Unlock()
	if before == phaseCreated && after != phaseCreated && r.ctx != nil && (after == phaseRunning || news) {
		r.emit(c, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	}
	if !news {
		return
	}
	r.emit(c, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
	r.spawn(func() {
		if err := c.persist(); err != nil && !errors.Is(err, unix.ENOENT) {
			r.log.Warn("write container record", "container", c.id, "error", err)
		}
	})
}

// lost settles a container that the shim does not know at Open: never started,
// or ended before.
func (c *container) lost() {
	switch {
	case c.rec.StartError != "":
		c.phase = phaseExited
		close(c.ended)
	case c.rec.Last != nil:
		c.phase, c.last = phaseExited, *c.rec.Last
		close(c.ended)
	}
}

// confirmLost asks again for a running container that a snapshot lacks; it may
// have been started after that was taken.
func (r *Runtime) confirmLost(c *container) {
	if _, err := r.shim.Status(r.ctx, c.id); err == nil || !shimNotFound(err) {
		return
	}
	_, st := c.snapshot()
	st.State, st.ExitCode, st.Signal = shim.StateExited, shim.LostExitCode, int(unix.SIGKILL)
	st.Reason, st.FinishedAt = shim.ReasonStatusLost, time.Now().UTC()
	r.apply(c, st)
}

// returnTTY gives the terminal that we kept to a shim that may be a new one.
func (r *Runtime) returnTTY(c *container) {
	c.mu.Lock()
	tty := c.tty
	c.mu.Unlock()
	if tty == nil {
		return
	}
	ctx, cancel := context.WithTimeout(r.ctx, keepTTYLimit)
	defer cancel()
	if err := r.shim.KeepTTY(ctx, c.id, tty); err != nil {
		r.log.Warn("give the terminal back to the shim", "container", c.id, "error", err)
	}
}

// pauseEnded: without its pause process a sandbox's shared PID namespace is
// dead, and so is the sandbox.
func (r *Runtime) pauseEnded(s *sandbox) {
	if !s.record().Ready {
		return
	}
	if err := s.update(func(rec *sandboxRecord) { rec.Ready = false }); err != nil {
		r.log.Warn("write sandbox record", "sandbox", s.id, "error", err)
	}
	r.emitSandbox(s, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
}
