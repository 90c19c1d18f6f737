package system

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"knarr/cli"
	"knarr/store/etcd"
	"knarr/system/pki"
)

const (
	// sharedKey holds, in an external etcd, what all servers of the cluster have in common, sealed with the join token. It lies outside of the
	// objects' prefix.
	sharedKey = "/knarr/shared"
	// sharedRanges is the entry of the flags that all servers must agree on.
	sharedRanges = "ranges.json"
)

// sharing makes the servers of one external etcd have the same authorities, service-account key and encryption keys. Each keeps copies
// in its own directory; the etcd's are the ones that count.
type sharing struct {
	engine *etcd.Engine
	config *cli.ServerConfig
}

func (s *sharing) tlsDir() string { return cli.TLSDir(s.config.Dir) }
func (s *sharing) encryption() string {
	return filepath.Join(cli.ServerDir(s.config.Dir), encryptionFile)
}

// fetch brings what the etcd holds into this server's directory; found is false where no server has shared anything yet.
func (s *sharing) fetch(ctx context.Context) (found bool, err error) {
	sealed, revision, err := s.engine.Get(ctx, sharedKey)
	if err != nil || revision == 0 {
		return false, err
	}
	files, secret, stale, err := s.unseal(sealed)
	if err != nil {
		return true, err
	}
	if err := s.sameRanges(files[sharedRanges]); err != nil {
		return true, err
	}
	if err := pki.Adopt(s.tlsDir(), files, secret); err != nil {
		return true, err
	}
	if keys := files[encryptionFile]; keys != nil {
		if err := writeSynced(s.encryption(), keys); err != nil {
			return true, err
		}
	}
	if stale {
		return true, s.put(ctx, files, secret, revision)
	}
	return true, nil
}

// unseal opens the data with the given token, or with what this server's directory knows; stale says that a token was needed that
// has been replaced since.
func (s *sharing) unseal(sealed []byte) (files map[string][]byte, secret string, stale bool, err error) {
	if s.config.Token != "" {
		token, err := pki.ParseToken(s.config.Token)
		if err != nil {
			return nil, "", false, err
		}
		if files, err = pki.Unseal(sealed, token.Secret); err == nil {
			err = pki.CheckShared(files, token)
		}
		if errors.Is(err, pki.ErrSealed) {
			err = fmt.Errorf("%w: `knarr token` on a server that runs prints the present one", err)
		}
		return files, token.Secret, false, err
	}
	secrets, err := pki.Secrets(s.tlsDir())
	if err != nil {
		return nil, "", false, err
	}
	for i, secret := range secrets {
		files, err := pki.Unseal(sealed, secret)
		if err == nil {
			return files, secrets[0], i > 0, nil
		}
		if !errors.Is(err, pki.ErrSealed) {
			return nil, "", false, err
		}
	}
	return nil, "", false, errors.New("other servers made the cluster in this etcd: give its token by --token, or KNARR_TOKEN in the environment (`knarr token` on one of them prints it)")
}

// publish shares what this server's directory holds, as the first server of the etcd.
func (s *sharing) publish(ctx context.Context) error {
	files, err := s.files()
	if err != nil {
		return err
	}
	secrets, err := pki.Secrets(s.tlsDir())
	if err != nil {
		return err
	}
	if len(secrets) == 0 {
		return errors.New("this server has no join token")
	}
	return s.put(ctx, files, secrets[0], 0)
}

func (s *sharing) files() (map[string][]byte, error) {
	files, err := pki.Shared(s.tlsDir())
	if err != nil {
		return nil, err
	}
	if files[sharedRanges], err = json.Marshal(s.ranges()); err != nil {
		return nil, err
	}
	keys, err := os.ReadFile(s.encryption())
	if errors.Is(err, fs.ErrNotExist) {
		return files, nil // the operator's own file, which is given to each server
	}
	files[encryptionFile] = keys
	return files, err
}

func (s *sharing) put(ctx context.Context, files map[string][]byte, secret string, expect int64) error {
	sealed, err := pki.Seal(files, secret)
	if err != nil {
		return err
	}
	ok, err := s.engine.Put(ctx, sharedKey, sealed, expect)
	if err == nil && !ok {
		err = errors.New("another server changed what the servers of this etcd share at the same moment: start this one again (a new one with --token and an empty directory)")
	}
	return err
}

// updateKeys replaces the shared encryption keys, before any server writes with them.
func (s *sharing) updateKeys(ctx context.Context, keys []byte) error {
	sealed, revision, err := s.engine.Get(ctx, sharedKey)
	if err != nil {
		return err
	}
	files, secret, _, err := s.unseal(sealed)
	if err != nil {
		return err
	}
	if string(files[encryptionFile]) == string(keys) {
		return nil
	}
	files[encryptionFile] = keys
	return s.put(ctx, files, secret, revision)
}

// ranges are the addresses that a cluster has once and for all.
type ranges struct{ PodCIDR, ServiceCIDR, ClusterDNS string }

func (s *sharing) ranges() ranges {
	return ranges{s.config.PodCIDR.String(), s.config.ServiceCIDR.String(), s.config.ClusterDNS.String()}
}

func (s *sharing) sameRanges(data []byte) error {
	var theirs ranges
	if err := json.Unmarshal(data, &theirs); err != nil {
		return fmt.Errorf("what the servers of this cluster share is damaged: %w", err)
	}
	if theirs != s.ranges() {
		return fmt.Errorf("the cluster in this etcd was made with --pod-cidr %s --service-cidr %s --cluster-dns %s: give the same to each of its servers",
			theirs.PodCIDR, theirs.ServiceCIDR, theirs.ClusterDNS)
	}
	return nil
}
