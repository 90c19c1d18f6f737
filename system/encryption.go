package system

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/runtime/schema"
	apiserverapi "k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig/controller"
	"k8s.io/apiserver/pkg/storage/value"

	"knarr/apiserver/options"
)

// encryptionFile holds the keys that Secrets are encrypted with at rest, in upstream's EncryptionConfiguration format:
// https://kubernetes.io/docs/tasks/administer-cluster/encrypt-data/. The first key
// writes, the others still read; rotation.go replaces it.
const encryptionFile = "encryption.yaml"

// secretboxKeyBytes is the size of a secretbox key.
const secretboxKeyBytes = 32

// noGrace is how long replaced keys are kept for calls under way: these are local and need no connection.
const noGrace = 0

// encryption is how objects are encrypted at rest. Its changes are for one goroutine at a time.
type encryption struct {
	path    string
	own     bool // the file is the operator's
	dynamic *encryptionconfig.DynamicTransformers
	// covered are the resources of knarr's own file.
	covered map[schema.GroupResource]value.Transformer
	// follow takes changes of the operator's file over until ctx ends; nil where they are not asked for.
	follow func(ctx context.Context)
}

// loadEncryption reads the operator's file, or knarr's own, making it with a key at the first start.
func loadEncryption(ctx context.Context, dir string, o options.Encryption) (*encryption, error) {
	e := &encryption{path: o.File, own: o.File != ""}
	if !e.own {
		e.path = filepath.Join(dir, encryptionFile)
		if err := ensureEncryption(e.path); err != nil {
			return nil, fmt.Errorf("encryption at rest: %w", err)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	config, err := encryptionconfig.LoadEncryptionConfig(ctx, e.path, true, "knarr")
	if err != nil {
		cancel()
		return nil, fmt.Errorf("encryption at rest: %s: %w", e.path, err)
	}
	e.covered = config.Transformers
	e.dynamic = encryptionconfig.NewDynamicTransformers(config.Transformers, config.HealthChecks[0], cancel, config.KMSCloseGracePeriod)
	if o.Reload {
		c := controller.NewDynamicEncryptionConfiguration("encryption-provider-config", e.path, e.dynamic, config.EncryptionFileContentHash, "knarr")
		e.follow = c.Run
	}
	return e, nil
}

// transformer gives what encrypts a resource; nil where the file names none of it. An operator's file may name it later.
func (e *encryption) transformer(r schema.GroupResource) value.Transformer {
	if e.covered[r] == nil && !e.own {
		return nil
	}
	return e.dynamic.TransformerForResource(r)
}

// reload takes knarr's own file over.
func (e *encryption) reload(ctx context.Context) error {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	config, err := encryptionconfig.LoadEncryptionConfig(ctx, e.path, true, "knarr")
	if err != nil {
		cancel()
		return fmt.Errorf("%s: %w", e.path, err)
	}
	e.dynamic.Set(config.Transformers, cancel, config.HealthChecks[0], noGrace)
	return nil
}

func ensureEncryption(path string) error {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	key, err := newEncryptionKey(nil)
	if err != nil {
		return err
	}
	return writeSynced(path, encryptionText([]apiserverapi.Key{key}))
}

// newEncryptionKey makes a key whose name none of the others ever had.
func newEncryptionKey(others []apiserverapi.Key) (apiserverapi.Key, error) {
	number := 0
	for _, k := range others {
		if n, err := strconv.Atoi(strings.TrimPrefix(k.Name, "key")); err == nil {
			number = max(number, n)
		}
	}
	key := make([]byte, secretboxKeyBytes)
	_, err := rand.Read(key)
	return apiserverapi.Key{Name: fmt.Sprintf("key%d", number+1), Secret: base64.StdEncoding.EncodeToString(key)}, err
}

// encryptionText is knarr's own file: the first key writes, all read, and so does identity what was stored before there was a key.
func encryptionText(keys []apiserverapi.Key) []byte {
	var b strings.Builder
	b.WriteString("apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n- resources: [\"secrets\"]\n  providers:\n  - secretbox:\n      keys:\n")
	for _, k := range keys {
		fmt.Fprintf(&b, "      - name: %s\n        secret: %s\n", k.Name, k.Secret)
	}
	b.WriteString("  - identity: {}\n")
	return []byte(b.String())
}

// keys reads knarr's own file.
func (e *encryption) keys() ([]apiserverapi.Key, error) {
	data, err := os.ReadFile(e.path)
	if err != nil {
		return nil, err
	}
	config, err := options.ParseEncryption(data, true)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", e.path, err)
	}
	if len(config.Resources) == 1 && len(config.Resources[0].Providers) > 0 && config.Resources[0].Providers[0].Secretbox != nil {
		keys := config.Resources[0].Providers[0].Secretbox.Keys
		if again, err := options.ParseEncryption(encryptionText(keys), true); err == nil && equality.Semantic.DeepEqual(again, config) {
			return keys, nil
		}
	}
	return nil, fmt.Errorf("%s is not as knarr makes it: a file of your own is given with --encryption-provider-config", e.path)
}

// writeSynced makes a private file that is whole or absent, also after a power cut.
func writeSynced(path string, data []byte) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
