// Package volume sets up the volumes of pods and takes them down again.
//
// The work is done by upstream's volume plugins; this package gives them a node
// (host), mounts by system call (Mounter) and a life cycle without a reconciler:
// SetUp runs all volumes of a pod in parallel and returns when they are there,
// Refresh rewrites those that follow the API (ConfigMap, Secret, projected,
// downward API) when something they show changed, TearDown works from what is
// on disk, so that it is right after any crash.
package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/record"
	"k8s.io/component-helpers/storage/ephemeral"
	storagevolume "k8s.io/component-helpers/storage/volume"
	upstream "k8s.io/kubernetes/pkg/volume"
	"k8s.io/kubernetes/pkg/volume/configmap"
	"k8s.io/kubernetes/pkg/volume/downwardapi"
	"k8s.io/kubernetes/pkg/volume/emptydir"
	"k8s.io/kubernetes/pkg/volume/hostpath"
	"k8s.io/kubernetes/pkg/volume/image"
	"k8s.io/kubernetes/pkg/volume/local"
	"k8s.io/kubernetes/pkg/volume/projected"
	"k8s.io/kubernetes/pkg/volume/secret"
	"k8s.io/kubernetes/pkg/volume/util"
	"k8s.io/kubernetes/pkg/volume/util/hostutil"
	"k8s.io/kubernetes/pkg/volume/util/subpath"

	"knarr/node/objects"
)

// Config is what a Manager needs; all fields are required.
type Config struct {
	// RootDir holds pods/<uid>/volumes/<plugin>/<volume>.
	RootDir  string
	NodeName string
	Client   kubernetes.Interface
	Objects  *objects.Store
	Tokens   *objects.Tokens
	Recorder record.EventRecorder
	// NodeLabels and Allocatable describe the node now.
	NodeLabels  func() map[string]string
	Allocatable func() v1.ResourceList
}

// Mount is one volume of a pod, ready for containers.
type Mount struct {
	// Path on the host; empty for image volumes, which the runtime mounts.
	Path string
	// InnerName is the name of the directory: that of the PersistentVolume, if any.
	InnerName string
	ReadOnly  bool
	// SELinuxRelabel asks the runtime to relabel the volume.
	SELinuxRelabel bool
}

// Manager sets up volumes. Create it with New. Safe for concurrent use; calls
// for one pod must come one after the other.
type Manager struct {
	host *host

	mu   sync.Mutex
	pods map[types.UID]map[string]*active
}

// active is a volume that is set up.
type active struct {
	mounter upstream.Mounter
	mount   Mount
	gid     string // supplemental group of a PersistentVolume
}

// New returns a Manager.
func New(cfg Config) (*Manager, error) {
	m := NewMounter()
	h := &host{Config: cfg, plugins: &upstream.VolumePluginMgr{}, mounter: m,
		hostu: hostutil.NewHostUtil(), subpath: subpath.New(m)}
	var plugins []upstream.VolumePlugin
	for _, probe := range []func() []upstream.VolumePlugin{
		emptydir.ProbeVolumePlugins, configmap.ProbeVolumePlugins, secret.ProbeVolumePlugins, projected.ProbeVolumePlugins,
		downwardapi.ProbeVolumePlugins, local.ProbeVolumePlugins, image.ProbeVolumePlugins,
	} {
		plugins = append(plugins, probe()...)
	}
	plugins = append(plugins, hostpath.ProbeVolumePlugins(upstream.VolumeConfig{})...)
	if err := h.plugins.InitPlugins(plugins, nil, h); err != nil {
		return nil, fmt.Errorf("volume plugins: %w", err)
	}
	return &Manager{host: h, pods: map[types.UID]map[string]*active{}}, nil
}

// PodDir returns the directory of a pod's files.
func (m *Manager) PodDir(uid types.UID) string { return m.host.podDir(uid) }

// Subpather prepares subPath mounts.
func (m *Manager) Subpather() subpath.Interface { return m.host.subpath }

// HostUtil looks at paths of the host.
func (m *Manager) HostUtil() hostutil.HostUtils { return m.host.hostu }

// Mounts returns the volumes of a pod that are set up, by name.
func (m *Manager) Mounts(uid types.UID) map[string]Mount {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make(map[string]Mount, len(m.pods[uid]))
	for name, a := range m.pods[uid] {
		out[name] = a.mount
	}
	return out
}

// ExtraGroups returns the supplemental groups that the PersistentVolumes of a
// pod ask for.
func (m *Manager) ExtraGroups(uid types.UID) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for _, a := range m.pods[uid] {
		if a.gid != "" {
			out = append(out, a.gid)
		}
	}
	return out
}

// SetUp makes all volumes that containers of the pod use available. It returns
// at once for volumes that are, and an error naming each that cannot be.
func (m *Manager) SetUp(ctx context.Context, pod *v1.Pod) error {
	return m.each(pod, func(v *v1.Volume) error {
		m.mu.Lock()
		_, done := m.pods[pod.UID][v.Name]
		m.mu.Unlock()
		if done {
			return nil
		}
		a, err := m.prepare(ctx, pod, v)
		if err == nil {
			err = a.setUp(pod, false, m.host.Recorder)
		}
		if err != nil {
			return fmt.Errorf("MountVolume.SetUp failed for volume %q : %w", v.Name, err)
		}
		a.mount.Path = a.mounter.GetPath()
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.pods[pod.UID] == nil {
			m.pods[pod.UID] = map[string]*active{}
		}
		m.pods[pod.UID][v.Name] = a
		return nil
	})
}

// Refresh writes the volumes of a pod again that show objects of the API.
func (m *Manager) Refresh(ctx context.Context, pod *v1.Pod) error {
	return m.each(pod, func(v *v1.Volume) error {
		if v.ConfigMap == nil && v.Secret == nil && v.Projected == nil && v.DownwardAPI == nil {
			return nil
		}
		m.mu.Lock()
		_, up := m.pods[pod.UID][v.Name]
		m.mu.Unlock()
		if !up {
			return nil
		}
		a, err := m.prepare(ctx, pod, v)
		if err == nil {
			err = a.setUp(pod, true, m.host.Recorder)
		}
		if err != nil {
			return fmt.Errorf("MountVolume.SetUp failed for volume %q : %w", v.Name, err)
		}
		return nil
	})
}

// each runs f for all volumes in use, in parallel, and joins the errors.
func (m *Manager) each(pod *v1.Pod, f func(v *v1.Volume) error) error {
	used, _, _ := util.GetPodVolumeNames(pod, false)
	errs := make([]error, len(pod.Spec.Volumes))
	var wg sync.WaitGroup
	for i := range pod.Spec.Volumes {
		v := pod.Spec.Volumes[i].DeepCopy() // plugins rename the volumes they wrap
		if used.Has(v.Name) {
			wg.Go(func() { errs[i] = f(v) })
		}
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (m *Manager) prepare(ctx context.Context, pod *v1.Pod, v *v1.Volume) (*active, error) {
	spec, gid, err := m.spec(ctx, pod, v)
	if err != nil {
		return nil, err
	}
	plugin, err := m.host.plugins.FindPluginBySpec(spec)
	if err != nil {
		return nil, err
	}
	if pv := spec.PersistentVolume; pv != nil && pv.Spec.NodeAffinity != nil {
		if err := storagevolume.CheckNodeAffinity(pv, m.host.NodeLabels()); err != nil {
			return nil, fmt.Errorf("NodeAffinity check failed: %w", err)
		}
	}
	mounter, err := plugin.NewMounter(spec, pod)
	if err != nil {
		return nil, err
	}
	attr := mounter.GetAttributes()
	return &active{mounter: mounter, gid: gid, mount: Mount{
		InnerName: spec.Name(), ReadOnly: attr.ReadOnly, SELinuxRelabel: attr.Managed && attr.SELinuxRelabel}}, nil
}

// spec resolves a volume of a pod, through its claim if it has one.
func (m *Manager) spec(ctx context.Context, pod *v1.Pod, v *v1.Volume) (*upstream.Spec, string, error) {
	claim, readOnly := "", false
	switch {
	case v.PersistentVolumeClaim != nil:
		claim, readOnly = v.PersistentVolumeClaim.ClaimName, v.PersistentVolumeClaim.ReadOnly
	case v.Ephemeral != nil:
		claim = ephemeral.VolumeClaimName(pod, v)
	default:
		return upstream.NewSpecFromVolume(v), "", nil
	}
	fail := func(err error) (*upstream.Spec, string, error) {
		return nil, "", fmt.Errorf("error processing PVC %s/%s: %w", pod.Namespace, claim, err)
	}
	pvc, err := m.host.Client.CoreV1().PersistentVolumeClaims(pod.Namespace).Get(ctx, claim, metav1.GetOptions{})
	if err != nil {
		return fail(fmt.Errorf("failed to fetch PVC from API server: %w", err))
	}
	switch {
	case pvc.DeletionTimestamp != nil:
		return fail(errors.New("PVC is being deleted"))
	case pvc.Status.Phase != v1.ClaimBound || pvc.Spec.VolumeName == "":
		return fail(errors.New("PVC is not bound"))
	}
	if v.Ephemeral != nil {
		if err := ephemeral.VolumeIsForPod(pod, pvc); err != nil {
			return fail(err)
		}
	}
	pv, err := m.host.Client.CoreV1().PersistentVolumes().Get(ctx, pvc.Spec.VolumeName, metav1.GetOptions{})
	if err != nil {
		return fail(fmt.Errorf("failed to fetch PV %s from API server: %w", pvc.Spec.VolumeName, err))
	}
	if ref := pv.Spec.ClaimRef; ref == nil || ref.UID != pvc.UID {
		return fail(fmt.Errorf("PV %s is bound to another claim", pv.Name))
	}
	if pv.Spec.VolumeMode != nil && *pv.Spec.VolumeMode == v1.PersistentVolumeBlock {
		return fail(fmt.Errorf("PV %s has volumeMode Block, which this node does not support", pv.Name))
	}
	return upstream.NewSpecFromPersistentVolume(pv, readOnly), pv.Annotations[util.VolumeGidAnnotationKey], nil
}

func (a *active) setUp(pod *v1.Pod, again bool, recorder record.EventRecorder) error {
	args := upstream.MounterArgs{FsUser: util.FsUserFrom(pod), Recorder: recorder, IsRemount: again}
	if sc := pod.Spec.SecurityContext; sc != nil {
		args.FsGroup, args.FSGroupChangePolicy = sc.FSGroup, sc.FSGroupChangePolicy
	}
	return a.mounter.SetUp(args)
}

// TearDown removes every volume of a pod and then the pod's directory. It goes
// by what is on disk and may be called for pods that nobody set up. Data of a
// volume that cannot be unmounted is never removed.
func (m *Manager) TearDown(uid types.UID) error {
	dir := m.host.podDir(uid)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		m.drop(uid)
		return nil
	}
	var errs []error
	subs, _ := filepath.Glob(filepath.Join(dir, "volume-subpaths", "*"))
	for _, s := range subs {
		errs = append(errs, m.host.subpath.CleanSubPaths(dir, filepath.Base(s)))
	}
	vols, _ := filepath.Glob(filepath.Join(dir, "volumes", "*", "*"))
	var wg sync.WaitGroup
	failed := make([]error, len(vols))
	for i, v := range vols {
		wg.Go(func() { failed[i] = m.tearDownOne(uid, v) })
	}
	wg.Wait()
	if err := errors.Join(append(errs, failed...)...); err != nil {
		return err
	}
	m.drop(uid)
	m.host.Tokens.Forget(uid)
	return m.removeDir(dir)
}

func (m *Manager) drop(uid types.UID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.pods, uid)
}

func (m *Manager) tearDownOne(uid types.UID, dir string) error {
	name, plugin := filepath.Base(dir), unescapedPlugin(filepath.Base(filepath.Dir(dir)))
	p, err := m.host.plugins.FindPluginByName(plugin)
	if err != nil {
		return fmt.Errorf("volume %s of pod %s: %w", name, uid, err)
	}
	u, err := p.NewUnmounter(name, uid)
	if err == nil {
		err = u.TearDown()
	}
	if err != nil {
		return fmt.Errorf("UnmountVolume.TearDown failed for volume %q of pod %s: %w", name, uid, err)
	}
	return nil
}

// removeDir removes the directory of a pod unless something is mounted in it.
func (m *Manager) removeDir(dir string) error {
	at, err := m.host.mounter.MountedBelow(dir)
	if err != nil {
		return fmt.Errorf("pod directory %s is kept: %w", dir, err)
	}
	if at != "" {
		return fmt.Errorf("pod directory %s is kept: %s is still mounted", dir, at)
	}
	return os.RemoveAll(dir)
}

// OnDisk returns the pods that have a directory.
func (m *Manager) OnDisk() ([]types.UID, error) {
	entries, err := os.ReadDir(m.host.GetPodsDir())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var out []types.UID
	for _, e := range entries {
		if e.IsDir() {
			out = append(out, types.UID(e.Name()))
		}
	}
	return out, nil
}
