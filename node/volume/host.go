package volume

import (
	"context"
	"errors"
	"path/filepath"

	authenticationv1 "k8s.io/api/authentication/v1"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	storagelisters "k8s.io/client-go/listers/storage/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	upstream "k8s.io/kubernetes/pkg/volume"
	"k8s.io/kubernetes/pkg/volume/util/hostutil"
	"k8s.io/kubernetes/pkg/volume/util/subpath"
	"k8s.io/mount-utils"
	utilstrings "k8s.io/utils/strings"
)

var errUnsupported = errors.New("not supported by this node")

// host is what upstream's volume plugins see of the node.
type host struct {
	Config
	plugins *upstream.VolumePluginMgr
	mounter Mounter
	hostu   hostutil.HostUtils
	subpath subpath.Interface
}

var (
	_ upstream.VolumeHost        = (*host)(nil)
	_ upstream.KubeletVolumeHost = (*host)(nil)
)

func (h *host) podDir(uid types.UID) string { return filepath.Join(h.RootDir, "pods", string(uid)) }

func (h *host) GetPluginDir(name string) string { return filepath.Join(h.RootDir, "plugins", name) }

func (h *host) GetVolumeDevicePluginDir(name string) string {
	return filepath.Join(h.RootDir, "plugins", name, "volumeDevices")
}

func (h *host) GetPodsDir() string { return filepath.Join(h.RootDir, "pods") }

func (h *host) GetPodVolumeDir(uid types.UID, plugin, volume string) string {
	return filepath.Join(h.podDir(uid), "volumes", plugin, volume)
}

func (h *host) GetPodPluginDir(uid types.UID, plugin string) string {
	return filepath.Join(h.podDir(uid), "plugins", plugin)
}

func (h *host) GetPodVolumeDeviceDir(uid types.UID, plugin string) string {
	return filepath.Join(h.podDir(uid), "volumeDevices", plugin)
}

func (h *host) GetKubeClient() kubernetes.Interface { return h.Client }

func (h *host) NewWrapperMounter(volName string, spec upstream.Spec, pod *v1.Pod) (upstream.Mounter, error) {
	wrapped := wrapperName(volName)
	if spec.Volume != nil {
		spec.Volume.Name = wrapped
	}
	plugin, err := h.plugins.FindPluginBySpec(&spec)
	if err != nil {
		return nil, err
	}
	return plugin.NewMounter(&spec, pod)
}

func (h *host) NewWrapperUnmounter(volName string, spec upstream.Spec, uid types.UID) (upstream.Unmounter, error) {
	wrapped := wrapperName(volName)
	if spec.Volume != nil {
		spec.Volume.Name = wrapped
	}
	plugin, err := h.plugins.FindPluginBySpec(&spec)
	if err != nil {
		return nil, err
	}
	return plugin.NewUnmounter(spec.Name(), uid)
}

func wrapperName(volName string) string { return "wrapped_" + volName }

func (h *host) GetMounter() mount.Interface { return h.mounter }

func (h *host) GetNodeAllocatable() (v1.ResourceList, error) { return h.Allocatable(), nil }

func (h *host) GetSecretFunc() func(namespace, name string) (*v1.Secret, error) {
	return h.Objects.Secret
}

func (h *host) GetConfigMapFunc() func(namespace, name string) (*v1.ConfigMap, error) {
	return h.Objects.ConfigMap
}

func (h *host) GetServiceAccountTokenFunc() func(namespace, name string, tr *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	return h.Tokens.Get
}

func (h *host) DeleteServiceAccountTokenFunc() func(uid types.UID) { return h.Tokens.Forget }

func (h *host) GetNodeLabels() (map[string]string, error) { return h.NodeLabels(), nil }

func (h *host) GetNodeName() types.NodeName { return types.NodeName(h.NodeName) }

func (h *host) GetAttachedVolumesFromNodeStatus() (map[v1.UniqueVolumeName]string, error) {
	return map[v1.UniqueVolumeName]string{}, nil
}

func (h *host) GetEventRecorder() record.EventRecorder { return h.Recorder }

func (h *host) GetSubpather() subpath.Interface { return h.subpath }

func (h *host) SetKubeletError(error) {}

func (h *host) GetInformerFactory() informers.SharedInformerFactory { return nil }

func (h *host) CSIDriverLister() storagelisters.CSIDriverLister { return nil }

func (h *host) CSIDriversSynced() cache.InformerSynced { return func() bool { return true } }

func (h *host) WaitForCacheSync() error { return nil }

func (h *host) GetHostUtil() hostutil.HostUtils { return h.hostu }

func (h *host) GetTrustAnchorsByName(name string, allowMissing bool) ([]byte, error) {
	return trustAnchorsByName(h.Client, name, allowMissing)
}

func (h *host) GetTrustAnchorsBySigner(signer string, selector *metav1.LabelSelector, allowMissing bool) ([]byte, error) {
	return trustAnchorsBySigner(h.Client, signer, selector, allowMissing)
}

func (h *host) GetPodCertificateCredentialBundle(context.Context, string, string, string, string, int) ([]byte, []byte, error) {
	return nil, nil, errUnsupported
}

func unescapedPlugin(name string) string { return utilstrings.UnescapeQualifiedName(name) }
