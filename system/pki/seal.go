package pki

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	// sealVersion starts sealed data, so that a later format can be told from this one.
	sealVersion = "knarr-sealed-1\n"
	// sealPurpose keeps the derived key apart from other uses of the join secret.
	sealPurpose = "knarr: what the servers of a cluster share"
	// sealSaltBytes is the size of the random salt of one sealing.
	sealSaltBytes = 32
	// sealKeyBytes is the size of an AES-256 key.
	sealKeyBytes = 32
)

// ErrSealed says that a secret does not open what was sealed: it was sealed with another one, or is damaged.
var ErrSealed = errors.New("the token does not open what the servers of this cluster share")

// sharedFiles are the files of an Authority that all servers of a cluster have in common. The join secret is not among them: it seals them.
func sharedFiles() []string { return []string{serverCAFile, clientCAFile, proxyCAFile, serviceKeyFile} }

// Shared reads what a server's directory has in common with those of the cluster's other servers, by file name. Files that are not
// there are left out.
func Shared(dir string) (map[string][]byte, error) {
	out := map[string][]byte{}
	for _, name := range sharedFiles() {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("certificates: %w", err)
		}
		out[name] = data
	}
	return out, nil
}

// Adopt writes what another server shared into a server's directory, durably; what is there already must be the same.
func Adopt(dir string, shared map[string][]byte, secret string) error {
	have, err := Shared(dir)
	if err != nil {
		return err
	}
	if err := makeDir(dir); err != nil {
		return fmt.Errorf("certificates: %w", err)
	}
	for _, name := range sharedFiles() {
		data, ok := shared[name]
		switch {
		case !ok:
			return fmt.Errorf("certificates: %s is not among what the servers share", name)
		case have[name] == nil:
			if err := writeFile(filepath.Join(dir, name), data); err != nil {
				return fmt.Errorf("certificates: %w", err)
			}
		case string(have[name]) != string(data):
			return fmt.Errorf("certificates: %s is not that of the cluster in the external store: this directory belongs to another cluster, give an empty one", filepath.Join(dir, name))
		}
	}
	return writeFile(filepath.Join(dir, tokenFile), []byte(secret+"\n"))
}

// Secrets are the join secrets that a server's directory knows: the present one, then the one before. Empty where there is none.
func Secrets(dir string) ([]string, error) {
	var out []string
	for _, name := range []string{tokenFile, oldTokenFile} {
		s, err := readSecret(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("certificates: %w", err)
		}
		out = append(out, s)
	}
	return out, nil
}

// CheckShared says whether the server authority among shared is the one that a join token names.
func CheckShared(shared map[string][]byte, t Token) error {
	c, _, err := parseCert(shared[serverCAFile])
	if err != nil {
		return fmt.Errorf("certificates: %s: %w", serverCAFile, err)
	}
	if fingerprint(c) != t.CAHash {
		return errors.New("the token is of another cluster than the external store")
	}
	return nil
}

// Seal encrypts files by name, with a key made of a join secret (AES-256-GCM, HKDF-SHA256).
func Seal(files map[string][]byte, secret string) ([]byte, error) {
	plain, err := json.Marshal(files)
	if err != nil {
		return nil, err
	}
	salt := make([]byte, sealSaltBytes)
	if _, err := rand.Read(salt); err != nil {
		return nil, err
	}
	box, err := sealer(secret, salt)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, box.NonceSize())
	if _, err := rand.Read(nonce); err != nil {
		return nil, err
	}
	out := append([]byte(sealVersion), salt...)
	out = append(out, nonce...)
	return box.Seal(out, nonce, plain, []byte(sealVersion)), nil
}

// Unseal is the reverse of Seal. A secret that does not fit is ErrSealed.
func Unseal(sealed []byte, secret string) (map[string][]byte, error) {
	head := len(sealVersion) + sealSaltBytes
	if len(sealed) < head || string(sealed[:len(sealVersion)]) != sealVersion {
		return nil, errors.New("what the servers of this cluster share has an unknown format: use the knarr version that wrote it")
	}
	box, err := sealer(secret, sealed[len(sealVersion):head])
	if err != nil {
		return nil, err
	}
	if len(sealed) < head+box.NonceSize() {
		return nil, ErrSealed
	}
	plain, err := box.Open(nil, sealed[head:head+box.NonceSize()], sealed[head+box.NonceSize():], []byte(sealVersion))
	if err != nil {
		return nil, ErrSealed
	}
	var files map[string][]byte
	if err := json.Unmarshal(plain, &files); err != nil {
		return nil, fmt.Errorf("what the servers of this cluster share is damaged: %w", err)
	}
	return files, nil
}

func sealer(secret string, salt []byte) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, []byte(secret), salt, sealPurpose, sealKeyBytes)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}
