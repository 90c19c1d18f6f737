package apiserver

import (
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
)

const (
	// maxImages bounds the images whose pull policy is remembered.
	maxImages = 1024
	// maxImageBytes bounds the name of one.
	maxImageBytes = 512
)

// pullPolicies remembers which policy upstream's defaults give a container that names none. It depends on nothing but the image's name, which
// upstream takes apart by regular expressions for each container of each pod. The zero value knows none; safe for concurrent use.
type pullPolicies struct {
	mu    sync.RWMutex
	known map[string]corev1.PullPolicy
}

var pulls pullPolicies

// setDefaults gives an object upstream's defaults.
// Source: SetDefaults_Container in k8s.io/kubernetes/pkg/apis/core/v1/defaults.go.
func setDefaults(obj runtime.Object) {
	pod, ok := obj.(*corev1.Pod)
	if !ok {
		legacyscheme.Scheme.Default(obj)
		return
	}
	news := pulls.fill(pod.Spec.InitContainers, nil)
	news = pulls.fill(pod.Spec.Containers, news)
	legacyscheme.Scheme.Default(obj)
	pulls.learn(news)
}

// fill sets the policies that it knows, and appends the containers to news that have none.
func (p *pullPolicies) fill(containers []corev1.Container, news []*corev1.Container) []*corev1.Container {
	p.mu.RLock()
	defer p.mu.RUnlock()
	for i := range containers {
		c := &containers[i]
		if c.ImagePullPolicy != "" {
			continue
		}
		if c.ImagePullPolicy = p.known[c.Image]; c.ImagePullPolicy == "" {
			news = append(news, c)
		}
	}
	return news
}

// learn remembers what the defaults gave.
func (p *pullPolicies) learn(news []*corev1.Container) {
	if len(news) == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range news {
		if len(c.Image) > maxImageBytes || c.ImagePullPolicy == "" {
			continue
		}
		if p.known == nil || len(p.known) >= maxImages {
			p.known = map[string]corev1.PullPolicy{}
		}
		p.known[strings.Clone(c.Image)] = c.ImagePullPolicy
	}
}
