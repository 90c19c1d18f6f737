package system

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	apiserverapi "k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"

	"knarr/api"
	"knarr/cli"
)

// rotation replaces the key of knarr's own encryption file, for `knarr secrets-encrypt`. Each step is durable before the next, and can be
// done again: the file says how far it came.
//
//  1. a new key is put in front of the old one (in the external etcd first, where there is one);
//  2. the server takes the file over, and waits for writes with the old key that are under way;
//  3. every Secret that is not stored under the new key is written anew;
//  4. when the store holds none any more, the old key is dropped.
//
// A server that stops in between reads with both keys when it starts again; the next rotation goes on where the last one stopped.
type rotation struct {
	encryption *encryption
	registry   *api.Registry
	sharing    *sharing // nil with the embedded store
	servers    func() ([]string, error)

	mu sync.Mutex // held by the rotation under way
}

// secrets is what knarr's own file encrypts.
var secrets = schema.GroupResource{Resource: "secrets"}

// handler serves cli.EncryptionPath: GET says how things are, POST rotates.
func (r *rotation) handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		var status cli.EncryptionStatus
		var err error
		switch req.Method {
		case http.MethodGet:
			status, err = r.status(req.Context())
		case http.MethodPost:
			status, err = r.rotate(req.Context())
		default:
			http.Error(w, "GET shows the keys in use, POST rotates them", http.StatusMethodNotAllowed)
			return
		}
		if err != nil {
			responsewriters.WriteRawJSON(http.StatusConflict, metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
				Status: metav1.StatusFailure, Reason: metav1.StatusReasonConflict, Code: http.StatusConflict, Message: err.Error()}, w)
			return
		}
		responsewriters.WriteRawJSON(http.StatusOK, status, w)
	})
}

func (r *rotation) status(ctx context.Context) (cli.EncryptionStatus, error) {
	s := cli.EncryptionStatus{File: r.encryption.path}
	if !r.encryption.own {
		keys, err := r.encryption.keys()
		if err != nil {
			return s, err
		}
		for _, k := range keys {
			s.Keys = append(s.Keys, k.Name)
		}
	}
	var err error
	s.Stored, err = r.registry.Kind(secrets).StoredKeys(ctx)
	return s, err
}

func (r *rotation) rotate(ctx context.Context) (cli.EncryptionStatus, error) {
	if !r.mu.TryLock() {
		return cli.EncryptionStatus{}, errors.New("a rotation is under way: `knarr secrets-encrypt status` shows it")
	}
	defer r.mu.Unlock()
	if err := r.alone(); err != nil {
		return cli.EncryptionStatus{}, err
	}
	keys, err := r.encryption.keys()
	if err != nil {
		return cli.EncryptionStatus{}, err
	}
	if len(keys) == 1 {
		next, err := newEncryptionKey(keys)
		if err != nil {
			return cli.EncryptionStatus{}, err
		}
		keys = append([]apiserverapi.Key{next}, keys...)
	}
	if err := r.use(ctx, keys); err != nil {
		return cli.EncryptionStatus{}, err
	}
	kind := r.registry.Kind(secrets)
	written, err := kind.Rewrite(ctx)
	if err != nil {
		return cli.EncryptionStatus{}, fmt.Errorf("after %d Secrets: %w; nothing is lost, rotate again to go on", written, err)
	}
	stored, err := kind.StoredKeys(ctx)
	if err != nil {
		return cli.EncryptionStatus{}, err
	}
	for key, n := range stored {
		if key != "secretbox/"+keys[0].Name {
			return cli.EncryptionStatus{}, fmt.Errorf("%d Secrets are still stored under %q: the old key stays; rotate again to go on", n, key)
		}
	}
	if err := r.use(ctx, keys[:1]); err != nil {
		return cli.EncryptionStatus{}, err
	}
	s, err := r.status(ctx)
	s.Rewritten = written
	return s, err
}

// alone refuses a rotation that other servers could not follow: they would read nothing of what this one writes.
func (r *rotation) alone() error {
	if r.encryption.own {
		return fmt.Errorf("the keys in %s are yours (--encryption-provider-config): put a new one in front of it on every server, restart them, "+
			"write every Secret anew (kubectl get secrets -A -o json | kubectl replace -f -), then take the old key out", r.encryption.path)
	}
	if r.sharing == nil {
		return nil
	}
	servers, err := r.servers()
	if err != nil {
		return err
	}
	if len(servers) > 1 {
		return fmt.Errorf("%d servers share this etcd (%v), and all must have a new key before one writes with it: stop all but one, "+
			"rotate, and start the others again, which then get the new key", len(servers), servers)
	}
	return nil
}

// use makes keys the ones in force: shared, on the disk, then in memory.
func (r *rotation) use(ctx context.Context, keys []apiserverapi.Key) error {
	text := encryptionText(keys)
	if r.sharing != nil {
		if err := r.sharing.updateKeys(ctx, text); err != nil {
			return err
		}
	}
	if err := writeSynced(r.encryption.path, text); err != nil {
		return err
	}
	return r.encryption.reload(ctx)
}
