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

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
)

// encryptionFile holds the keys that Secrets are encrypted with at rest, in upstream's EncryptionConfiguration format:
// https://kubernetes.io/docs/tasks/administer-cluster/encrypt-data/. A key added in front becomes the writing key at the
// next start; the others still read.
const encryptionFile = "encryption.yaml"

// secretboxKeyBytes is the size of a secretbox key.
const secretboxKeyBytes = 32

// loadEncryption gives the transformers of the resources that are encrypted at rest, making a key at the first start.
func loadEncryption(ctx context.Context, dir string) (map[schema.GroupResource]value.Transformer, error) {
	path := filepath.Join(dir, encryptionFile)
	if err := ensureEncryption(path); err != nil {
		return nil, fmt.Errorf("encryption at rest: %w", err)
	}
	config, err := encryptionconfig.LoadEncryptionConfig(ctx, path, false, "knarr")
	if err != nil {
		return nil, fmt.Errorf("encryption at rest: %s: %w", path, err)
	}
	return config.Transformers, nil
}

func ensureEncryption(path string) error {
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	key := make([]byte, secretboxKeyBytes)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	text := fmt.Sprintf(`apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: ["secrets"]
  providers:
  - secretbox:
      keys:
      - name: key1
        secret: %s
  - identity: {}
`, base64.StdEncoding.EncodeToString(key))
	return writeSynced(path, []byte(text))
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
