package runtime

import (
	"encoding/json"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"knarr/node/shim"
)

const (
	sandboxFile   = "sandbox.json"
	containerFile = "container.json"
)

// sandboxRecord is sandbox.json. Config is a runtimeapi.PodSandboxConfig in
// protobuf encoding, which no field gets lost in.
type sandboxRecord struct {
	ID             string   `json:"id"`
	CreatedAt      int64    `json:"createdAt"` // nanoseconds of the epoch
	RuntimeHandler string   `json:"runtimeHandler,omitempty"`
	Config         []byte   `json:"config"`
	CgroupParent   string   `json:"cgroupParent"`        // the pod's cgroup
	OwnCgroup      bool     `json:"ownCgroup,omitempty"` // we made it and remove it
	Ready          bool     `json:"ready"`               // everything was made and nothing stopped
	TornDown       bool     `json:"tornDown,omitempty"`  // everything is gone but the record
	NetworkUp      bool     `json:"networkUp,omitempty"` // SetUp was begun
	IPs            []string `json:"ips,omitempty"`       // primary first
	PausePID       int      `json:"pausePID,omitempty"`  // first process of a shared PID namespace
	BootID         string   `json:"bootID,omitempty"`    // run of the kernel that the namespaces belong to
	UserNS         bool     `json:"userNS,omitempty"`    // has a user namespace
	Hostname       string   `json:"hostname,omitempty"`  // in the UTS namespace
	HostNetwork    bool     `json:"hostNetwork,omitempty"`
}

// containerRecord is container.json. Config is a runtimeapi.ContainerConfig
// and Resources a runtimeapi.LinuxContainerResources, in protobuf encoding.
type containerRecord struct {
	ID         string   `json:"id"`
	SandboxID  string   `json:"sandboxID"`
	CreatedAt  int64    `json:"createdAt"`
	Config     []byte   `json:"config"`
	Resources  []byte   `json:"resources,omitempty"` // as updated
	ImageID    string   `json:"imageID"`
	ImageRef   string   `json:"imageRef"`
	ImageName  string   `json:"imageName"`
	LogPath    string   `json:"logPath,omitempty"`
	StopSignal string   `json:"stopSignal,omitempty"`
	User       execUser `json:"user"`
	Cgroup     string   `json:"cgroup"`
	// StartError is why the process could not be started; the container has
	// ended then.
	StartError   string `json:"startError,omitempty"`
	StartErrorAt int64  `json:"startErrorAt,omitempty"`
	// Last is the end as the shim told it, kept here in case the shim's state is
	// lost; with it the end has been published as an event.
	Last *shim.Status `json:"last,omitempty"`
}

// save writes a record: after a crash of the process the old or the new one is
// there in full. With durable that also holds after a power loss; without, the
// record may be gone then, and with it nothing that outlives a power loss.
func save(dir, name string, v any, durable bool) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, "."+name)
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil && durable {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, filepath.Join(dir, name))
	}
	return err
}

func load(dir, name string, v any) error {
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	return json.Unmarshal(data, v)
}

func encode(m proto.Message) ([]byte, error) { return proto.Marshal(m) }

func decodeSandboxConfig(data []byte) (*runtimeapi.PodSandboxConfig, error) {
	c := &runtimeapi.PodSandboxConfig{}
	return c, proto.Unmarshal(data, c)
}

func decodeContainerConfig(data []byte) (*runtimeapi.ContainerConfig, error) {
	c := &runtimeapi.ContainerConfig{}
	return c, proto.Unmarshal(data, c)
}

func decodeResources(data []byte) (*runtimeapi.LinuxContainerResources, error) {
	r := &runtimeapi.LinuxContainerResources{}
	return r, proto.Unmarshal(data, r)
}
