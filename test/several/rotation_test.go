package several

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// secretsEncrypt runs `knarr secrets-encrypt` on a server.
func secretsEncrypt(t *testing.T, s *server, what string) (string, error) {
	t.Helper()
	out, err := exec.Command(knarr(t), "secrets-encrypt", what, "--data-dir", filepath.Dir(s.dir), "--name", filepath.Base(s.dir)).CombinedOutput()
	return string(out), err
}

func (s *server) encryptionFile() string { return filepath.Join(s.dir, "server", "encryption.yaml") }

// makeSecrets makes n Secrets; same checks that they are still what they were.
func makeSecrets(t *testing.T, s *server, n int) {
	t.Helper()
	var all sync.WaitGroup
	work := make(chan int)
	for range 8 {
		all.Go(func() {
			for i := range work {
				_, err := s.CoreV1().Secrets("default").Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("r%d", i)},
					StringData: map[string]string{"n": fmt.Sprint(i)}}, metav1.CreateOptions{})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range n {
		work <- i
	}
	close(work)
	all.Wait()
}

func same(t *testing.T, s *server, n int) {
	t.Helper()
	list, err := s.CoreV1().Secrets("default").List(t.Context(), metav1.ListOptions{})
	require.NoError(t, err)
	require.Len(t, list.Items, n)
	for i := range list.Items {
		require.Equal(t, strings.TrimPrefix(list.Items[i].Name, "r"), string(list.Items[i].Data["n"]))
	}
}

// TestTheKeyOfSecretsRotates replaces the key, also with a kill -9 in the middle; the engine is asked for the bytes that it keeps.
func TestTheKeyOfSecretsRotates(t *testing.T) {
	for name, start := range map[string]func(t *testing.T) *etcd{"embedded": func(*testing.T) *etcd { return nil }, "etcd": startEtcd} {
		t.Run(name, func(t *testing.T) { testRotation(t, newServer(t, start(t), 0)) })
	}
}

func testRotation(t *testing.T, s *server) {
	const n = 400
	s.start(t)
	makeSecrets(t, s, n)
	said, err := secretsEncrypt(t, s, "status")
	require.NoError(t, err, said)
	require.Contains(t, said, fmt.Sprintf("stored under secretbox/key1: %d Secrets", n))

	said, err = secretsEncrypt(t, s, "rotate")
	require.NoError(t, err, said)
	require.Contains(t, said, fmt.Sprintf("stored under secretbox/key2: %d Secrets", n))
	require.Contains(t, said, fmt.Sprintf("written anew: %d Secrets", n))
	require.NotContains(t, said, "key1")
	text, err := os.ReadFile(s.encryptionFile())
	require.NoError(t, err)
	require.NotContains(t, string(text), "key1")
	same(t, s, n)

	rotating := exec.Command(knarr(t), "secrets-encrypt", "rotate", "--data-dir", filepath.Dir(s.dir), "--name", filepath.Base(s.dir))
	require.NoError(t, rotating.Start())
	eventually(t, "the new key is in the file", func() (bool, string) {
		text, err := os.ReadFile(s.encryptionFile())
		return err == nil && strings.Contains(string(text), "key3"), string(text)
	})
	s.stop(syscall.SIGKILL)
	_ = rotating.Wait()

	s.start(t)
	same(t, s, n)
	said, err = secretsEncrypt(t, s, "status")
	require.NoError(t, err, said)
	t.Logf("after the kill:\n%s", said)
	require.Contains(t, said, "keys: key3")
	said, err = secretsEncrypt(t, s, "rotate")
	require.NoError(t, err, said)
	if strings.Contains(said, "key4") { // the kill came too late: it was a rotation of its own
		require.NotContains(t, said, "key3")
	} else {
		require.Contains(t, said, fmt.Sprintf("stored under secretbox/key3: %d Secrets", n))
		require.NotContains(t, said, "key2")
	}
	same(t, s, n)
	s.stop(syscall.SIGKILL)
	s.start(t)
	same(t, s, n)
}

// TestANewServerHasTheRotatedKey refuses a rotation that another server could not follow, and brings the new key to one that starts later.
func TestANewServerHasTheRotatedKey(t *testing.T) {
	_, servers := startTwo(t)
	makeSecrets(t, servers[0], 5)
	eventually(t, "both servers are known to live", func() (bool, string) {
		said, err := secretsEncrypt(t, servers[0], "rotate")
		return err != nil && strings.Contains(said, "2 servers share this etcd"), said
	})
	servers[1].stop(syscall.SIGTERM)
	said, err := secretsEncrypt(t, servers[0], "rotate")
	require.NoError(t, err, said)
	servers[1].start(t)
	same(t, servers[1], 5)
}
