package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"
)

const (
	// manifestPause is how long the directory must be quiet before it is read:
	// editors write a file in several steps.
	manifestPause = 100 * time.Millisecond
	// mirrorRetry is the pause before a mirror pod that could not be written is
	// tried again.
	mirrorRetry = 5 * time.Second
	// uidBytes is how much of a hash makes the UID of a static pod.
	uidBytes = 16
)

// static runs the pods of a directory of manifests. Each has a mirror in the
// API, which shows its status and cannot change it.
type static struct {
	a    *Agent
	wake chan struct{} // holds one: mirrors are to be compared

	mu      sync.Mutex
	pods    map[types.UID]*v1.Pod
	mirrors map[string]*v1.Pod // by namespace/name, as the API has them
}

func newStatic(a *Agent) *static {
	return &static{a: a, wake: make(chan struct{}, 1), pods: map[types.UID]*v1.Pod{}, mirrors: map[string]*v1.Pod{}}
}

// run follows the directory until ctx ends. ready is called once the manifests
// have been read for the first time.
func (s *static) run(ctx context.Context, ready func()) {
	dir := s.a.opts.StaticPodDir
	log := klog.FromContext(ctx)
	if dir == "" {
		ready()
		return
	}
	w, err := fsnotify.NewWatcher()
	if err == nil {
		defer w.Close()
		err = errors.Join(os.MkdirAll(dir, 0o755), w.Add(dir))
	}
	if err != nil {
		log.Error(err, "Static pods are not run", "dir", dir)
		ready()
		return
	}
	s.read(ctx)
	ready()
	s.wakeUp()
	quiet := time.NewTimer(time.Hour)
	quiet.Stop()
	retry := time.NewTimer(time.Hour)
	retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.Events:
			quiet.Reset(manifestPause)
		case err := <-w.Errors:
			log.Error(err, "Watch of static pods", "dir", dir)
			quiet.Reset(manifestPause)
		case <-quiet.C:
			s.read(ctx)
			s.wakeUp()
		case <-s.wake:
			if !s.mirror(ctx) {
				retry.Reset(mirrorRetry)
			}
		case <-retry.C:
			s.wakeUp()
		}
	}
}

func (s *static) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// read compares the manifests with what runs.
func (s *static) read(ctx context.Context) {
	want := map[types.UID]*v1.Pod{}
	files, err := filepath.Glob(filepath.Join(s.a.opts.StaticPodDir, "*"))
	if err != nil {
		return
	}
	for _, f := range files {
		if strings.HasPrefix(filepath.Base(f), ".") {
			continue
		}
		pod, err := s.parse(f)
		if err != nil {
			klog.FromContext(ctx).Error(err, "Manifest of a static pod not used", "file", f)
			continue
		}
		want[pod.UID] = pod
	}
	s.mu.Lock()
	var gone []types.UID
	for uid := range s.pods {
		if want[uid] == nil {
			gone = append(gone, uid)
		}
	}
	s.pods = want
	s.mu.Unlock()
	for _, uid := range gone {
		if w := s.a.worker(uid); w != nil {
			w.remove(nil)
		}
	}
	for _, pod := range want {
		s.a.admit(ctx, pod)
	}
}

// parse makes a pod of a manifest. Its UID depends on node, file and content:
// a changed manifest is another pod.
func (s *static) parse(file string) (*v1.Pod, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	obj, err := runtime.Decode(legacyscheme.Codecs.UniversalDecoder(v1.SchemeGroupVersion), data)
	if err != nil {
		return nil, err
	}
	pod, ok := obj.(*v1.Pod)
	if !ok || pod.Name == "" {
		return nil, fmt.Errorf("holds a %T, not a named Pod", obj)
	}
	node := s.a.opts.NodeName
	sum := sha256.Sum256([]byte(node + "\x00" + file + "\x00" + string(data)))
	hash := hex.EncodeToString(sum[:uidBytes])
	pod.UID, pod.Name = types.UID(hash), pod.Name+"-"+strings.ToLower(node)
	if pod.Namespace == "" {
		pod.Namespace = v1.NamespaceDefault
	}
	if pod.Annotations == nil {
		pod.Annotations = map[string]string{}
	}
	pod.Annotations[kubetypes.ConfigHashAnnotationKey] = hash
	pod.Annotations[kubetypes.ConfigSourceAnnotationKey] = kubetypes.FileSource
	pod.CreationTimestamp = metav1.Now()
	pod.Spec.NodeName = node
	pod.Spec.Tolerations = append(pod.Spec.Tolerations, v1.Toleration{Operator: v1.TolerationOpExists, Effect: v1.TaintEffectNoExecute})
	pod.Status.Phase = v1.PodPending
	return pod, nil
}

// seen takes in a mirror pod of the API.
func (s *static) seen(mirror *v1.Pod, gone bool) {
	key := mirror.Namespace + "/" + mirror.Name
	s.mu.Lock()
	if gone {
		delete(s.mirrors, key)
	} else {
		s.mirrors[key] = mirror
	}
	uid := types.UID(mirror.Annotations[kubetypes.ConfigMirrorAnnotationKey])
	pod := s.pods[uid]
	s.mu.Unlock()
	if pod != nil && !gone && mirror.DeletionTimestamp == nil {
		s.a.statuses.SetMirror(uid, mirror)
		return
	}
	s.wakeUp()
}

// mirror makes the mirrors fit the pods and reports whether it could.
func (s *static) mirror(ctx context.Context) bool {
	s.mu.Lock()
	create, remove := map[string]*v1.Pod{}, []*v1.Pod{}
	for _, pod := range s.pods {
		create[pod.Namespace+"/"+pod.Name] = pod
	}
	for key, m := range s.mirrors {
		pod := create[key]
		if pod != nil && m.DeletionTimestamp == nil && m.Annotations[kubetypes.ConfigMirrorAnnotationKey] == string(pod.UID) {
			delete(create, key)
		} else {
			remove = append(remove, m)
		}
	}
	s.mu.Unlock()
	ok := true
	for _, m := range remove {
		err := s.a.opts.Client.CoreV1().Pods(m.Namespace).Delete(ctx, m.Name, metav1.DeleteOptions{
			GracePeriodSeconds: new(int64), Preconditions: metav1.NewUIDPreconditions(string(m.UID))})
		ok = s.fine(ctx, err, apierrors.IsNotFound, "Mirror pod not removed", m) && ok
	}
	for _, pod := range create {
		made, err := s.a.opts.Client.CoreV1().Pods(pod.Namespace).Create(ctx, s.mirrorOf(pod), metav1.CreateOptions{})
		ok = s.fine(ctx, err, apierrors.IsAlreadyExists, "Mirror pod not made", pod) && ok
		if err == nil {
			s.a.statuses.SetMirror(pod.UID, made)
		}
	}
	return ok
}

func (s *static) fine(ctx context.Context, err error, except func(error) bool, what string, pod *v1.Pod) bool {
	if err == nil || except(err) || ctx.Err() != nil {
		return true
	}
	klog.FromContext(ctx).Error(err, what, "pod", klog.KObj(pod))
	return false
}

func (s *static) mirrorOf(pod *v1.Pod) *v1.Pod {
	m := pod.DeepCopy()
	m.UID, m.CreationTimestamp, m.Status = "", metav1.Time{}, v1.PodStatus{}
	m.Annotations[kubetypes.ConfigMirrorAnnotationKey] = string(pod.UID)
	yes, node := true, s.a.node.get()
	m.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node.Name, UID: node.UID, Controller: &yes}}
	return m
}
