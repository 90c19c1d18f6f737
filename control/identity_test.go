package control

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"
)

// Controllers that sleep until they are needed wake up and do their work: tokens of secrets, certificates, disruption budgets, claims.
func TestSleepersWakeUp(t *testing.T) {
	c := newCluster(t)
	ctx := t.Context()
	c.eventually("service account", func(ctx context.Context) error {
		_, err := c.admin.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	_, err := c.admin.CoreV1().Secrets("default").Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "token",
		Annotations: map[string]string{corev1.ServiceAccountNameKey: "default"}}, Type: corev1.SecretTypeServiceAccountToken}, metav1.CreateOptions{})
	require.NoError(t, err)
	c.eventually("the secret gets a token and the root certificate", func(ctx context.Context) error {
		s, err := c.admin.CoreV1().Secrets("default").Get(ctx, "token", metav1.GetOptions{})
		if err == nil && (len(s.Data[corev1.ServiceAccountTokenKey]) == 0 || string(s.Data[corev1.ServiceAccountRootCAKey]) != string(c.ca.ServerCAPEM())) {
			err = notYet("%d fields", len(s.Data))
		}
		return err
	})
	t.Run("certificates", func(t *testing.T) { certificates(t, c) })
	t.Run("budget", func(t *testing.T) { budget(t, c) })
	t.Run("claim", func(t *testing.T) { claim(t, c) })
}

func certificates(t *testing.T, c *cluster) {
	ctx := t.Context()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "jane"}}, key)
	require.NoError(t, err)
	csr, err := c.admin.CertificatesV1().CertificateSigningRequests().Create(ctx, &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{Name: "jane"}, Spec: certificatesv1.CertificateSigningRequestSpec{
			Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), SignerName: certificatesv1.KubeAPIServerClientSignerName,
			Usages: []certificatesv1.KeyUsage{certificatesv1.UsageClientAuth}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue, Reason: "Test"}}
	_, err = c.admin.CertificatesV1().CertificateSigningRequests().UpdateApproval(ctx, "jane", csr, metav1.UpdateOptions{})
	require.NoError(t, err)
	c.eventually("the certificate is signed by the authority of clients", func(ctx context.Context) error {
		csr, err := c.admin.CertificatesV1().CertificateSigningRequests().Get(ctx, "jane", metav1.GetOptions{})
		if err != nil {
			return err
		}
		block, _ := pem.Decode(csr.Status.Certificate)
		if block == nil {
			return notYet("%+v", csr.Status)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return err
		}
		_, err = cert.Verify(x509.VerifyOptions{Roots: c.ca.ClientCAPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		return err
	})
}

func budget(t *testing.T, c *cluster) {
	ctx := t.Context()
	c.node("one")
	c.agent(running)
	labels := map[string]string{"app": "b"}
	_, err := c.admin.PolicyV1().PodDisruptionBudgets("default").Create(ctx, &policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Name: "b"},
		Spec: policyv1.PodDisruptionBudgetSpec{MinAvailable: ptr.To(intstr.FromInt32(1)), Selector: &metav1.LabelSelector{MatchLabels: labels}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	pod := podTemplate(labels, "")
	_, err = c.admin.CoreV1().Pods("default").Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "b", Labels: labels}, Spec: pod.Spec}, metav1.CreateOptions{})
	require.NoError(t, err)
	c.eventually("the budget knows its healthy pod", func(ctx context.Context) error {
		b, err := c.admin.PolicyV1().PodDisruptionBudgets("default").Get(ctx, "b", metav1.GetOptions{})
		if err == nil && b.Status.CurrentHealthy != 1 {
			err = notYet("%+v", b.Status)
		}
		return err
	})
	err = c.admin.PolicyV1().Evictions("default").Evict(ctx, &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: "b", Namespace: "default"}})
	require.True(t, apierrors.IsTooManyRequests(err), "%v", err)
}

func claim(t *testing.T, c *cluster) {
	ctx := t.Context()
	_, err := c.admin.CoreV1().PersistentVolumes().Create(ctx, &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "v"},
		Spec: corev1.PersistentVolumeSpec{Capacity: size("1Gi"), AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			PersistentVolumeSource: corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/tmp"}}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = c.admin.CoreV1().PersistentVolumeClaims("default").Create(ctx, &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: "c"},
		Spec: corev1.PersistentVolumeClaimSpec{StorageClassName: ptr.To(""), AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources: corev1.VolumeResourceRequirements{Requests: size("1Gi")}}}, metav1.CreateOptions{})
	require.NoError(t, err)
	c.eventually("claim and volume are bound and protected", func(ctx context.Context) error {
		pvc, err := c.admin.CoreV1().PersistentVolumeClaims("default").Get(ctx, "c", metav1.GetOptions{})
		pv, err2 := c.admin.CoreV1().PersistentVolumes().Get(ctx, "v", metav1.GetOptions{})
		if err = errors.Join(err, err2); err == nil && (pvc.Status.Phase != corev1.ClaimBound || pv.Status.Phase != corev1.VolumeBound || len(pvc.Finalizers) == 0) {
			err = notYet("%s %s %v", pvc.Status.Phase, pv.Status.Phase, pvc.Finalizers)
		}
		return err
	})
	require.NoError(t, c.admin.CoreV1().PersistentVolumeClaims("default").Delete(ctx, "c", metav1.DeleteOptions{}))
	c.eventually("an unused claim goes", func(ctx context.Context) error {
		_, err := c.admin.CoreV1().PersistentVolumeClaims("default").Get(ctx, "c", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, errors.New("still there"))
	})
}

func size(s string) corev1.ResourceList {
	return corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(s)}
}
