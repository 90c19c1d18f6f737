package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/client-go/tools/cache"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/kubelet/events"
	"k8s.io/kubernetes/pkg/volume/util"
)

// Version is what the node says it runs.
const Version = "v1.36.3+knarr"

const (
	// reportEvery is how often an unchanged node status is written.
	reportEvery = 5 * time.Minute
	// nodeRetryFirst and nodeRetryMax bound the pause after a failed write.
	nodeRetryFirst = 100 * time.Millisecond
	nodeRetryMax   = 7 * time.Second
	// maxImages and maxImageNames bound the image list of the node status.
	maxImages     = 50
	maxImageNames = 5
	// Memory and share of the disk that are never given to pods: where hard
	// eviction begins.
	evictMemoryBytes = 100 << 20
	evictDiskPercent = 10
)

// nodeState keeps the Node object up to date.
type nodeState struct {
	a    *Agent
	wake chan struct{} // holds one

	mu       sync.Mutex
	node     *v1.Node // newest object of the API; nil before registration
	cidrs    []string // handed to OnPodCIDR last
	pressure map[v1.NodeConditionType]bool
	machine  machine
	lastSent time.Time
}

func newNodeState(a *Agent) *nodeState {
	return &nodeState{a: a, wake: make(chan struct{}, 1), pressure: map[v1.NodeConditionType]bool{}, machine: readMachine()}
}

func (n *nodeState) poke() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

func (n *nodeState) ref() *v1.ObjectReference {
	return &v1.ObjectReference{Kind: "Node", Name: n.a.opts.NodeName, UID: types.UID(n.a.opts.NodeName)}
}

// get returns the newest Node, or, before it is registered, what it will be.
func (n *nodeState) get() *v1.Node {
	n.mu.Lock()
	node := n.node
	n.mu.Unlock()
	if node == nil {
		node = n.initial()
	}
	return node
}

func (n *nodeState) labels() map[string]string { return n.get().Labels }

// allocatable is what pods can have of the node.
func (a *Agent) allocatable() v1.ResourceList { return a.node.resources(true) }

// resources returns capacity or, with less of it, allocatable.
func (n *nodeState) resources(allocatable bool) v1.ResourceList {
	o := &n.a.opts
	d, err := statDisk(o.RootDir)
	if err != nil {
		klog.Background().Error(err, "Size of the disk not known", "dir", o.RootDir)
	}
	list := v1.ResourceList{
		v1.ResourceCPU:              *resource.NewQuantity(int64(n.machine.cpus), resource.DecimalSI),
		v1.ResourceMemory:           *resource.NewQuantity(int64(n.machine.memoryBytes), resource.BinarySI),
		v1.ResourcePods:             *resource.NewQuantity(int64(o.MaxPods), resource.DecimalSI),
		v1.ResourceEphemeralStorage: *resource.NewQuantity(int64(d.total), resource.BinarySI),
	}
	huge := int64(0)
	for size, bytes := range n.machine.hugePages {
		list[v1.ResourceName(v1.ResourceHugePagesPrefix+size)] = *resource.NewQuantity(int64(bytes), resource.BinarySI)
		huge += int64(bytes)
	}
	if !allocatable {
		return list
	}
	list[v1.ResourceMemory] = *resource.NewQuantity(int64(n.machine.memoryBytes)-evictMemoryBytes-huge, resource.BinarySI)
	list[v1.ResourceEphemeralStorage] = *resource.NewQuantity(int64(d.total-d.total*evictDiskPercent/100), resource.DecimalSI)
	for name, q := range o.Reserved {
		if have, ok := list[name]; ok {
			have.Sub(q)
			list[name] = have
		}
	}
	return list
}

// initial is the Node as it is registered.
func (n *nodeState) initial() *v1.Node {
	o := &n.a.opts
	labels := map[string]string{}
	for k, v := range o.Labels {
		labels[k] = v
	}
	for k, v := range n.defaultLabels() {
		labels[k] = v
	}
	node := &v1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: o.NodeName, Labels: labels,
			Annotations: map[string]string{util.ControllerManagedAttachAnnotation: "true"}},
		Spec: v1.NodeSpec{Taints: slices.Clone(o.Taints)},
	}
	n.fill(node)
	return node
}

func (n *nodeState) defaultLabels() map[string]string {
	return map[string]string{
		v1.LabelHostname: n.a.opts.NodeName, v1.LabelOSStable: goruntime.GOOS, v1.LabelArchStable: goruntime.GOARCH,
		"beta.kubernetes.io/os": goruntime.GOOS, "beta.kubernetes.io/arch": goruntime.GOARCH,
	}
}

// fill sets everything in the status that the node knows.
func (n *nodeState) fill(node *v1.Node) {
	s, o := &node.Status, &n.a.opts
	s.Capacity, s.Allocatable = n.resources(false), n.resources(true)
	s.Addresses = nil
	for _, ip := range o.NodeIPs {
		s.Addresses = append(s.Addresses, v1.NodeAddress{Type: v1.NodeInternalIP, Address: ip.String()})
	}
	s.Addresses = append(s.Addresses, v1.NodeAddress{Type: v1.NodeHostName, Address: o.NodeName})
	s.DaemonEndpoints.KubeletEndpoint.Port = n.port()
	m := &n.machine
	s.NodeInfo = v1.NodeSystemInfo{
		MachineID: m.machineID, SystemUUID: m.systemUUID, BootID: m.bootID, KernelVersion: m.kernel, OSImage: m.osImage,
		OperatingSystem: goruntime.GOOS, Architecture: goruntime.GOARCH, KubeletVersion: Version,
		ContainerRuntimeVersion: n.runtimeVersion(),
	}
	n.fillRuntime(node)
	n.fillConditions(node)
}

func (n *nodeState) port() int32 {
	_, port, _ := strings.Cut(reverseCut(n.a.Address()), " ")
	p, _ := strconv.Atoi(port)
	return int32(p)
}

// reverseCut splits "host:port" at its last colon into "host port".
func reverseCut(address string) string {
	i := strings.LastIndexByte(address, ':')
	if i < 0 {
		return address
	}
	return address[:i] + " " + address[i+1:]
}

func (n *nodeState) runtimeVersion() string {
	if n.a.runtime == nil {
		return ""
	}
	version := "unknown"
	ctx, cancel := context.WithTimeout(n.a.ctx, nodeRetryMax)
	defer cancel()
	if v, err := n.a.opts.Runtime.Version(ctx, ""); err == nil && v.RuntimeVersion != "" {
		version = v.RuntimeVersion
	}
	return n.a.runtime.Type() + "://" + version
}

// fillRuntime lists what the runtime offers: images, handlers, features.
func (n *nodeState) fillRuntime(node *v1.Node) {
	if n.a.runtime == nil {
		return
	}
	ctx, cancel := context.WithTimeout(n.a.ctx, nodeRetryMax)
	defer cancel()
	if images, err := n.a.runtime.ListImages(ctx); err == nil {
		slices.SortFunc(images, func(a, b imageInfo) int { return cmp.Or(cmp.Compare(b.Size, a.Size), cmp.Compare(a.ID, b.ID)) })
		node.Status.Images = nil
		for _, img := range images[:min(len(images), maxImages)] {
			names := append(slices.Clone(img.RepoDigests), img.RepoTags...)
			node.Status.Images = append(node.Status.Images, v1.ContainerImage{Names: names[:min(len(names), maxImageNames)], SizeBytes: img.Size})
		}
	}
	node.Status.RuntimeHandlers = nil
	for name, h := range n.a.handlers {
		rro, users := h.SupportsRecursiveReadOnlyMounts, h.SupportsUserNamespaces
		node.Status.RuntimeHandlers = append(node.Status.RuntimeHandlers, v1.NodeRuntimeHandler{Name: name,
			Features: &v1.NodeRuntimeHandlerFeatures{RecursiveReadOnlyMounts: &rro, UserNamespaces: &users}})
	}
	slices.SortFunc(node.Status.RuntimeHandlers, func(a, b v1.NodeRuntimeHandler) int { return cmp.Compare(a.Name, b.Name) })
	if f := n.a.features; f != nil {
		node.Status.Features = &v1.NodeFeatures{SupplementalGroupsPolicy: &f.SupplementalGroupsPolicy}
	}
	node.Status.DeclaredFeatures = n.a.declaredFeatures()
}

// setPressure notes that the node is, or is no longer, short of something.
func (n *nodeState) setPressure(t v1.NodeConditionType, on bool) {
	n.mu.Lock()
	changed := n.pressure[t] != on
	n.pressure[t] = on
	n.mu.Unlock()
	if changed {
		n.poke()
	}
}

func (n *nodeState) hasPressure(t v1.NodeConditionType) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.pressure[t]
}

// fillConditions sets the node's conditions; their times are kept where
// nothing changed.
func (n *nodeState) fillConditions(node *v1.Node) {
	now := metav1.NewTime(time.Now())
	set := func(t v1.NodeConditionType, on bool, reason, message string) {
		c := v1.NodeCondition{Type: t, Status: v1.ConditionFalse, Reason: reason, Message: message, LastHeartbeatTime: now, LastTransitionTime: now}
		if on {
			c.Status = v1.ConditionTrue
		}
		i := slices.IndexFunc(node.Status.Conditions, func(old v1.NodeCondition) bool { return old.Type == t })
		if i < 0 {
			node.Status.Conditions = append(node.Status.Conditions, c)
			return
		}
		if old := node.Status.Conditions[i]; old.Status == c.Status {
			c.LastTransitionTime = old.LastTransitionTime
		}
		node.Status.Conditions[i] = c
	}
	pressure := func(t v1.NodeConditionType, badReason, badMessage, goodReason, goodMessage string) {
		if n.hasPressure(t) {
			set(t, true, badReason, badMessage)
		} else {
			set(t, false, goodReason, goodMessage)
		}
	}
	pressure(v1.NodeMemoryPressure, "KubeletHasInsufficientMemory", "kubelet has insufficient memory available",
		"KubeletHasSufficientMemory", "kubelet has sufficient memory available")
	pressure(v1.NodeDiskPressure, "KubeletHasDiskPressure", "kubelet has disk pressure", "KubeletHasNoDiskPressure", "kubelet has no disk pressure")
	pressure(v1.NodePIDPressure, "KubeletHasInsufficientPID", "kubelet has insufficient PID available",
		"KubeletHasSufficientPID", "kubelet has sufficient PID available")
	if err := n.a.problem(); err != nil {
		set(v1.NodeReady, false, "KubeletNotReady", err.Error())
	} else {
		set(v1.NodeReady, true, "KubeletReady", "kubelet is posting ready status")
	}
}

// problem is why the node cannot run pods.
func (a *Agent) problem() error {
	if err := a.runtimeProblem(); err != nil {
		return err
	}
	if err := a.networkProblem(); err != nil {
		return fmt.Errorf("container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:%w", err)
	}
	return nil
}

// runtimeProblem is why containers cannot be run.
func (a *Agent) runtimeProblem() error {
	if a.runtime == nil {
		return errors.New("container runtime status check may not have completed yet")
	}
	ctx, cancel := context.WithTimeout(a.ctx, nodeRetryMax)
	defer cancel()
	st, err := a.opts.Runtime.Status(ctx, false)
	if err != nil {
		return fmt.Errorf("container runtime is down: %w", err)
	}
	for _, c := range st.GetStatus().GetConditions() {
		if c.Type == runtimeapi.RuntimeReady && !c.Status {
			return fmt.Errorf("container runtime not ready: RuntimeReady=false reason:%s message:%s", c.Reason, c.Message)
		}
	}
	return nil
}

// networkProblem is why pods cannot get a network.
func (a *Agent) networkProblem() error { return a.opts.NetworkReady() }

// keepNode registers the node and keeps its status and lease fresh until ctx ends.
func (a *Agent) keepNode(ctx context.Context) {
	n := a.node
	_, err := a.nodeInformer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { n.observe(obj.(*v1.Node)) },
		UpdateFunc: func(_, obj any) { n.observe(obj.(*v1.Node)) },
		DeleteFunc: func(any) { n.forget() },
	})
	if err != nil {
		klog.FromContext(ctx).Error(err, "Node cannot be watched")
	}
	n.retry(ctx, "Node not registered", n.register)
	a.recorder.Event(n.ref(), v1.EventTypeNormal, events.StartingKubelet, "Starting kubelet.")
	a.wg.Go(func() { a.keepLease(ctx) })
	timer := time.NewTimer(reportEvery)
	defer timer.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		case <-timer.C:
		}
		n.retry(ctx, "Node status not written", n.report)
		timer.Reset(reportEvery)
	}
}

// retry repeats f until it succeeds or ctx ends.
func (n *nodeState) retry(ctx context.Context, what string, f func(context.Context) error) {
	for pause := nodeRetryFirst; ; pause = min(2*pause, nodeRetryMax) {
		err := f(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		klog.FromContext(ctx).Error(err, what, "node", n.a.opts.NodeName, "retryIn", pause)
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

// register creates the Node, or takes over the one that exists.
func (n *nodeState) register(ctx context.Context) error {
	nodes := n.a.opts.Client.CoreV1().Nodes()
	created, err := nodes.Create(ctx, n.initial(), metav1.CreateOptions{})
	if err == nil {
		n.observe(created)
		n.mu.Lock()
		n.lastSent = time.Now()
		n.mu.Unlock()
		return nil
	}
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	old, err := nodes.Get(ctx, n.a.opts.NodeName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	next := old.DeepCopy()
	if next.Labels == nil {
		next.Labels = map[string]string{}
	}
	for k, v := range n.defaultLabels() {
		next.Labels[k] = v
	}
	if !apiequality.Semantic.DeepEqual(old.Labels, next.Labels) {
		if next, err = n.patch(ctx, old, next, ""); err != nil {
			return err
		}
	}
	n.observe(next)
	return n.report(ctx)
}

// report writes the status if it changed or is due.
func (n *nodeState) report(ctx context.Context) error {
	n.mu.Lock()
	old, last := n.node, n.lastSent
	n.mu.Unlock()
	if old == nil {
		return n.register(ctx)
	}
	next := old.DeepCopy()
	n.fill(next)
	if time.Since(last) < reportEvery && !statusChanged(&old.Status, &next.Status) {
		return nil
	}
	n.readyEvent(old, next)
	updated, err := n.patch(ctx, old, next, "status")
	if apierrors.IsNotFound(err) {
		n.forget()
		return n.register(ctx)
	}
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.lastSent = time.Now()
	n.mu.Unlock()
	n.observe(updated)
	return nil
}

func (n *nodeState) readyEvent(old, next *v1.Node) {
	was, is := readyStatus(old), readyStatus(next)
	switch {
	case was == is || was == "":
	case is == v1.ConditionTrue:
		n.a.recorder.Eventf(n.ref(), v1.EventTypeNormal, events.NodeReady, "Node %s status is now: %s", n.a.opts.NodeName, events.NodeReady)
	default:
		n.a.recorder.Eventf(n.ref(), v1.EventTypeNormal, events.NodeNotReady, "Node %s status is now: %s", n.a.opts.NodeName, events.NodeNotReady)
	}
}

func readyStatus(node *v1.Node) v1.ConditionStatus {
	for _, c := range node.Status.Conditions {
		if c.Type == v1.NodeReady {
			return c.Status
		}
	}
	return ""
}

// statusChanged compares without heartbeats.
func statusChanged(a, b *v1.NodeStatus) bool {
	x, y := a.DeepCopy(), b.DeepCopy()
	for _, s := range []*v1.NodeStatus{x, y} {
		for i := range s.Conditions {
			s.Conditions[i].LastHeartbeatTime = metav1.Time{}
			s.Conditions[i].LastTransitionTime = metav1.Time{}
		}
	}
	return !apiequality.Semantic.DeepEqual(x, y)
}

func (n *nodeState) patch(ctx context.Context, old, next *v1.Node, subresource string) (*v1.Node, error) {
	before, err := json.Marshal(old)
	if err != nil {
		return nil, err
	}
	after, err := json.Marshal(next)
	if err != nil {
		return nil, err
	}
	p, err := strategicpatch.CreateTwoWayMergePatch(before, after, v1.Node{})
	if err != nil {
		return nil, err
	}
	var sub []string
	if subresource != "" {
		sub = []string{subresource}
	}
	return n.a.opts.Client.CoreV1().Nodes().Patch(ctx, next.Name, types.StrategicMergePatchType, p, metav1.PatchOptions{}, sub...)
}

// observe takes in a newer Node.
func (n *nodeState) observe(node *v1.Node) {
	if node.Name != n.a.opts.NodeName {
		return // a server that ignores field selectors sends others, too
	}
	n.mu.Lock()
	if n.node != nil && n.node.UID == node.UID && newer(n.node, node) {
		n.mu.Unlock()
		return
	}
	n.node = node
	cidrs := node.Spec.PodCIDRs
	if len(cidrs) == 0 && node.Spec.PodCIDR != "" {
		cidrs = []string{node.Spec.PodCIDR}
	}
	changed := len(cidrs) > 0 && !slices.Equal(cidrs, n.cidrs)
	if changed {
		n.cidrs = slices.Clone(cidrs)
		n.a.opts.OnPodCIDR(slices.Clone(cidrs)) // under the lock: one call at a time, in order
	}
	n.mu.Unlock()
	if changed {
		n.a.NetworkChanged()
	}
}

// newer reports whether a is a later version than b.
func newer(a, b *v1.Node) bool {
	x, errX := strconv.ParseUint(a.ResourceVersion, 10, 64)
	y, errY := strconv.ParseUint(b.ResourceVersion, 10, 64)
	return errX == nil && errY == nil && x > y
}

func (n *nodeState) forget() {
	n.mu.Lock()
	n.node = nil
	n.mu.Unlock()
	n.poke()
}
